"""``python -m kernels.compile``: the Triton kernel -> PTX, for devices that have no Triton.

Runs anywhere that Triton installs; no GPU is needed. The files hold no paths and no times: the same Triton version
writes the same bytes. What comes out is checked here: entry name and arguments, PTX version, target, and that the
kernel wants no scratch memory, which only Triton's own launcher would provide.

A folder can be read at any time while it is written: names hold the contents' hash, so no file changes; the index,
which is replaced at once, comes after the files it names, and only then go those that it names no more.

Does not run a kernel.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from kernels.ptx import ARGUMENTS, ENTRY, INDEX, SHIPPED, Entry, Index, Kernel, KernelError, layout_of, read_index
from kernels.spec import DTYPES, PLUGIN_FIELDS

__all__ = ["ISA", "compile_all", "main"]

# PTX version per architecture. 8.0 is CUDA 12.0's, so that every driver of the CUDA 12 family translates it (JetPack
# 6.1 has 12.6, which knows up to 8.5); sm_120 exists from 8.7, sm_110 from 9.0 on (PTX ISA, release notes).
ISA = {80: 80, 87: 80, 89: 80, 90: 80, 110: 90, 120: 87}
TRITON_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
PARAMETERS = ("u64", "u64", "u32", "u32", "u32", "u64")  # of ARGUMENTS, in PTX


def compile_all(scales: Sequence[int], folder: Path, architectures: Sequence[int] = tuple(ISA)) -> int:
    """Compile for all dtypes and write PTX into ``folder`` and its index; how many files. Other kernels stay there.

    Nothing is written before all are compiled.

    Raises:
        KernelError: Triton is absent, or made something that a device could not launch.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = read_index(folder).kernels if (folder / INDEX).exists() else ()
    with tempfile.TemporaryDirectory() as cache:
        prepare_triton(cache)
        made = [compile_one(tuple(scales), dtype, sm) for sm in architectures for dtype in DTYPES]
    write(folder, made, before)
    return len(made)


def write(folder: Path, made: Sequence[Kernel], before: Sequence[Entry]) -> None:
    """Put kernels into a folder; those of the same purpose that its index named ``before`` go."""
    replaced = {purpose(kernel.facts) for kernel in made}
    kept = [entry for entry in before if purpose(entry) not in replaced]
    entries = (*(kernel.facts for kernel in made), *kept)
    for kernel in made:
        put(folder / kernel.facts.file, kernel.ptx)
    put(folder / INDEX, msgspec.json.format(msgspec.json.encode(Index(ARGUMENTS, entries)), indent=1) + b"\n")
    for name in {entry.file for entry in before} - {entry.file for entry in entries}:
        (folder / name).unlink(missing_ok=True)


def purpose(entry: Entry) -> tuple[int, str, tuple[int, ...]]:
    """What an index has one kernel for."""
    return entry.sm, entry.dtype, entry.scales


def put(path: Path, content: bytes) -> None:
    """Write a file under another name, then give it its own."""
    unfinished = path.with_name(f".{path.name}.part")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def prepare_triton(cache: str) -> None:
    """Settings that Triton reads when it is imported."""
    if "triton" in sys.modules or os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise KernelError("Triton is loaded already, or TRITON_INTERPRET is set; compile in a process of its own")
    os.environ.update(TRITON_CACHE_DIR=cache, TRITON_DISABLE_LINE_INFO="1", TRITON_DEFAULT_FP_FUSION="0")
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise KernelError(f"Triton cannot be imported ({error}); pip install triton") from error


def compile_one(scales: tuple[int, ...], dtype: str, sm: int) -> Kernel:
    """One kernel, checked."""
    assert len(ENTRY) < 16, "see kernels.ptx"
    layout = layout_of(scales, dtype)
    constants = {"SCALES": scales, "ROWS": layout.rows, "ONE_PASS": layout.one_pass, "BLOCK": layout.block}
    raw, metadata = triton_ptx(dtype, sm, constants, layout.warps)
    scratch = [getattr(metadata, f"{kind}_scratch_size", 0) for kind in ("global", "profile")]
    expect(not any(scratch), f"scratch memory of {scratch} bytes", "none")
    ptx = cleaned(raw).encode("ascii")
    check(ptx.decode("ascii"), sm, layout.warps)
    sha256 = hashlib.sha256(ptx).hexdigest()
    entry = Entry(
        file=file_name(scales, dtype, sm, sha256),
        entry=ENTRY,
        sm=sm,
        dtype=dtype,
        scales=scales,
        layout=layout,
        shared=int(metadata.shared),
        ptx_version=f"{ISA[sm] // 10}.{ISA[sm] % 10}",
        triton=str(metadata.triton_version),
        sha256=sha256,
    )
    return Kernel(entry, ptx)


def file_name(scales: Sequence[int], dtype: str, sm: int, sha256: str) -> str:
    """What a kernel's file is called."""
    return f"{ENTRY}-{'-'.join(map(str, scales))}-sm{sm}-{dtype}-{sha256[:8]}.ptx"


def triton_ptx(dtype: str, sm: int, constants: dict[str, Any], warps: int) -> tuple[str, Any]:
    """Triton's PTX and what it tells about it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.errors import TritonError

    from kernels import triton_pool

    pointer = f"*{TRITON_NAMES[dtype]}"
    signature = dict(zip(ARGUMENTS, (pointer, "*i64", "i32", "i32", "i32", pointer), strict=True))
    source = ASTSource(
        fn=triton_pool.gather_pool,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(position,): [["tt.divisibility", 16]] for position in (0, 1, 5)},
    )
    options = {"num_warps": warps, "ptx_version": ISA[sm], "enable_fp_fusion": False}
    try:
        made = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    except TritonError as error:
        found = re.search(r"ptxas.*(?:fatal|error).*", str(error)) or re.search(r".+", str(error))
        reason = " ".join((found[0] if found else type(error).__name__).split())
        message = f"Triton {triton.__version__} cannot compile for sm_{sm} ({reason}); use a newer Triton"
        raise KernelError(message) from error
    return made.asm["ptx"], made.metadata


def cleaned(ptx: str) -> str:
    """Without comments and debug information, for the whole family of the target, and with our parameters only.

    Triton appends two pointers to scratch memory; nobody reads them where both are empty, and TensorRT would not pass
    them. It also asks for architecture-specific targets (sm_90a), which do not run on newer devices; what the kernel
    uses is in every one.
    """
    ptx = re.sub(r"\s*//.*", "", ptx)
    ptx = re.sub(r"^\s*\.(file|loc)\s.*\n", "", ptx, flags=re.M)
    ptx = re.sub(r"^\s*\.section\s+\.debug\w*\s*\{.*?\}\s*", "", ptx, flags=re.M | re.S)
    ptx = re.sub(r"^(\.target sm_\d+)a?\b.*$", r"\1", ptx, flags=re.M)
    for position in range(len(ARGUMENTS), len(ARGUMENTS) + 2):
        name = f"{ENTRY}_param_{position}"
        expect(len(re.findall(rf"\b{name}\b", ptx)) <= 1, f"a read of {name}", "scratch pointers that nobody reads")
        ptx = re.sub(rf",\s*\.param[^,()]*\b{name}\b", "", ptx)
    return "\n".join(line.rstrip() for line in ptx.splitlines() if line.strip()) + "\n"


def check(ptx: str, sm: int, warps: int) -> None:
    """Refuse PTX that a device of the architecture, or TensorRT, could not launch."""
    header = dict(re.findall(r"^\.(version|target) (.*)$", ptx, flags=re.M))
    version = int(header["version"].replace(".", ""))
    expect(version <= ISA[sm], f"PTX version {header['version']}", f"at most {ISA[sm]} (tenths)")
    expect(header["target"] == f"sm_{sm}", f"target {header['target']}", f"sm_{sm}")
    entries = re.findall(r"\.visible \.entry (\w+)\((.*?)\)", ptx, flags=re.S)
    expect([name for name, _ in entries] == [ENTRY], f"entries {[name for name, _ in entries]}", ENTRY)
    types = tuple(re.findall(r"\.param \.(\w+)", entries[0][1]))
    expect(types == PARAMETERS, f"parameters {types}", str(PARAMETERS))
    expect(f".reqntid {warps * 32}" in ptx or f".maxntid {warps * 32}" in ptx, "another block", f"{warps * 32} threads")
    expect(".extern" not in ptx, "an external symbol", "none")


def expect(holds: bool, found: str, expected: str) -> None:
    """Refuse what Triton made."""
    if not holds:
        raise KernelError(f"Triton made a kernel with {found}; expected {expected}; use another Triton version")


def scales_of(text: str) -> tuple[int, ...]:
    """``1,2,4`` -> (1, 2, 4).

    Raises:
        argparse.ArgumentTypeError: not one to eight whole numbers from 1 on.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > len(PLUGIN_FIELDS) or not all(re.fullmatch("[1-9][0-9]{0,8}", part) for part in parts):
        expected = f"1 to {len(PLUGIN_FIELDS)} whole numbers from 1 on, as in 1,2,4"
        raise argparse.ArgumentTypeError(f"found {text!r:.40}, expected {expected}")
    return tuple(map(int, parts))


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with 2."""
        self.exit(2, f"kernels.compile: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = Parser(prog="python -m kernels.compile", description="Compile the LinVT kernel to PTX.")
    parser.add_argument("--scales", type=scales_of, default=(1, 2, 4), help="pooling scales (1,2,4)")
    parser.add_argument("-o", "--output", type=Path, default=SHIPPED, help="folder to write (the package's own)")
    parser.add_argument("--sm", type=int, nargs="+", choices=tuple(ISA), default=tuple(ISA), help="architectures")
    options = parser.parse_args(arguments)
    try:
        count = compile_all(options.scales, options.output, options.sm)
    except (KernelError, OSError) as error:
        print(f"kernels.compile: {error}", file=sys.stderr)  # noqa: T201  a command speaks
        return 1
    print(f"{count} kernels in {options.output}")  # noqa: T201  a command speaks
    return 0


if __name__ == "__main__":
    sys.exit(main())
