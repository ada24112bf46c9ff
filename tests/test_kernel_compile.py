"""Compiled kernels: what is shipped, what is chosen for a device, and that compiling again gives the same."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from kernels.compile import ISA, check, cleaned, file_name, main, write
from kernels.ptx import ARGUMENTS, ENTRY, INDEX, SHIPPED, Kernel, KernelError, find, read_index
from kernels.spec import DTYPES
from tests.kernel_interpreter import triton_spec

SCALES = (1, 2, 4)
NEEDS_TRITON = pytest.mark.skipif(triton_spec() is None, reason="Triton is not installed")


def compiled(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "kernels.compile", "-o", str(folder), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def test_every_device_and_dtype_is_shipped_and_nothing_else() -> None:
    kernels = read_index(SHIPPED).kernels
    assert {(entry.sm, entry.dtype, entry.scales) for entry in kernels} == {
        (sm, dtype, SCALES) for sm in ISA for dtype in DTYPES
    }
    assert {path.name for path in SHIPPED.iterdir()} == {INDEX, *(entry.file for entry in kernels)}
    for entry in kernels:
        text = find(divmod(entry.sm, 10), entry.dtype, SCALES).ptx.decode("ascii")
        check(text, entry.sm, entry.layout.warps)
        assert len(entry.entry) < 16, "longer names are lost in the bindings of TensorRT 10.9 to 10.13"
        assert not re.search(r"//|\.file|\.loc|\.debug|/|python", text), f"{entry.file} holds traces of its making"
        if entry.sm <= 90:
            assert entry.ptx_version <= "8.5", "JetPack 6.1 has CUDA 12.6"
        if entry.dtype == "bfloat16":
            assert "cvt.rn.bf16" in text, "rounds to nearest"


@pytest.mark.parametrize(
    ("sm", "chosen"), [((8, 0), 80), ((8, 6), 80), ((8, 7), 87), ((10, 0), 90), ((12, 1), 120), ((13, 0), 120)]
)
def test_a_device_gets_the_newest_kernel_that_is_not_newer(sm: tuple[int, int], chosen: int) -> None:
    assert find(sm, "float16", SCALES).facts.sm == chosen


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"runs float32 on sm_75; the oldest is for sm_80$"):
        find((7, 5), "float32", SCALES)
    with pytest.raises(KernelError, match=r"runs float64 on sm_87; none is of float64$"):
        find((8, 7), "float64", SCALES)
    with pytest.raises(KernelError, match=r"python -m kernels\.compile --scales 1,6"):
        find((8, 7), "float32", (1, 6))
    with pytest.raises(KernelError, match="is no index of kernels"):
        find((8, 7), "float32", SCALES, [tmp_path])
    (tmp_path / INDEX).write_text('{"kernels": 3}')
    with pytest.raises(KernelError, match="is no index of kernels"):
        find((8, 7), "float32", SCALES, [tmp_path])


def test_a_damaged_or_missing_file_is_not_launched(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED, tmp_path / "ptx")
    folder = tmp_path / "ptx"
    entry = find((8, 7), "float32", SCALES, [folder]).facts
    (folder / entry.file).write_text("damaged")
    with pytest.raises(KernelError, match="sha256"):
        find((8, 7), "float32", SCALES, [folder])
    (folder / entry.file).unlink()
    with pytest.raises(KernelError, match="cannot be read"):
        find((8, 7), "float32", SCALES, [folder])


def stored(folder: Path, sm: int) -> Path:
    """A folder with the shipped kernels of one architecture."""
    folder.mkdir()
    entries = tuple(entry for entry in read_index(SHIPPED).kernels if entry.sm == sm)
    write(folder, [Kernel(entry, (SHIPPED / entry.file).read_bytes()) for entry in entries], ())
    return folder


def test_a_folder_that_is_named_comes_before_the_package_and_the_next_folder(tmp_path: Path) -> None:
    older, newer = stored(tmp_path / "older", 80), stored(tmp_path / "newer", 89)
    chosen = [
        find(sm, "float16", SCALES, folders).facts.sm
        for sm, folders in (((8, 7), [older]), ((8, 7), [newer]), ((8, 9), [older, newer]), ((8, 9), [newer, older]))
    ]
    assert chosen == [80, 87, 80, 89]


def other(kernel: Kernel, text: str) -> Kernel:
    """As another Triton would compile it."""
    ptx = kernel.ptx + text.encode()
    sha256 = hashlib.sha256(ptx).hexdigest()
    facts = kernel.facts
    name = file_name(facts.scales, facts.dtype, facts.sm, sha256)
    return Kernel(msgspec.structs.replace(facts, file=name, sha256=sha256), ptx)


def test_kernels_take_the_place_of_older_ones_and_others_stay(tmp_path: Path) -> None:
    folder = stored(tmp_path / "ptx", 87)
    before = read_index(folder).kernels
    made = other(find((8, 7), "float16", SCALES, [folder]), "\n")
    write(folder, [made], before)
    assert find((8, 7), "float16", SCALES, [folder]) == made
    assert find((8, 7), "float32", SCALES, [folder]).facts in before
    names = {entry.file for entry in read_index(folder).kernels}
    assert len(names) == len(DTYPES) and {path.name for path in folder.iterdir()} == {INDEX, *names}


def cut_short(after: int) -> Callable[[Path, Path], Path]:
    """A rename that finds the disk full when it was called so often."""
    replace, calls = Path.replace, iter(range(after))

    def replace_or_fail(path: Path, target: Path) -> Path:
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(path, target)

    return replace_or_fail


def test_writing_that_is_cut_short_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stored(tmp_path / "ptx", 87)
    before = read_index(folder)
    kernels = [find((8, 7), dtype, SCALES, [folder]) for dtype in DTYPES]
    for at in range(len(kernels) + 1):  # the last is the index
        with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
            patched.setattr(Path, "replace", cut_short(at))
            write(folder, [other(kernel, "\n" * (at + 1)) for kernel in kernels], before.kernels)
        assert read_index(folder) == before
        assert [find((8, 7), dtype, SCALES, [folder]) for dtype in DTYPES] == kernels
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def raw_ptx() -> str:
    """As Triton writes it: comments, an architecture-specific target, two scratch pointers."""
    text = find((9, 0), "float32", SCALES).ptx.decode()
    text = text.replace(".target sm_90", ".target sm_90a")
    scratch = "".join(f",\n\t.param .u64 .ptr .global .align 1 {ENTRY}_param_{i}" for i in (6, 7))
    return text.replace(f"{ENTRY}_param_5\n)", f"{ENTRY}_param_5{scratch}\n)").replace("ret;", "ret;  // a comment")


def test_cleaning_leaves_our_parameters_and_the_plain_target() -> None:
    raw = raw_ptx()
    assert f"{ENTRY}_param_7" in raw
    assert cleaned(raw).encode() == find((9, 0), "float32", SCALES).ptx
    with pytest.raises(KernelError, match=f"a read of {ENTRY}_param_6"):
        cleaned(raw.replace("ret;", f"ld.param.b64 %rd1, [{ENTRY}_param_6];\nret;"))


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (".version 8.0", ".version 8.7", "PTX version 8.7"),
        (".target sm_90", ".target sm_90a", "target sm_90a"),
        (".entry gather_pool", ".entry other", "entries"),
        (".param .u32 gather_pool_param_4", ".param .u64 gather_pool_param_4", "parameters"),
        (".reqntid 64", ".reqntid 128", "another block"),
        (".address_size 64", ".address_size 64\n.extern .shared .b8 s[];", "external"),
    ],
)
def test_a_kernel_that_could_not_be_launched_is_refused(old: str, new: str, found: str) -> None:
    text = find((9, 0), "float32", SCALES).ptx.decode()
    check(text, 90, 2)
    assert old in text
    with pytest.raises(KernelError, match=found):
        check(text.replace(old, new), 90, 2)


@NEEDS_TRITON
def test_compiling_again_gives_the_shipped_files(tmp_path: Path) -> None:
    done = compiled(tmp_path, "--sm", "80", "87", "90")
    assert done.returncode == 0, done.stderr[-2000:]
    found, shipped = read_index(tmp_path), read_index(SHIPPED)
    assert found.arguments == shipped.arguments == ARGUMENTS
    of_purpose = {(entry.sm, entry.dtype): entry for entry in shipped.kernels}
    for entry in found.kernels:
        before = of_purpose[entry.sm, entry.dtype]
        assert (entry.entry, entry.layout, entry.shared) == (before.entry, before.layout, before.shared)
        if entry.triton == before.triton:
            assert entry.file == before.file
            assert (tmp_path / entry.file).read_bytes() == (SHIPPED / entry.file).read_bytes()


@NEEDS_TRITON
def test_other_scales_are_compiled_into_a_folder_and_found_there(tmp_path: Path) -> None:
    for scales in ("2,3", "1,3,5,8"):
        done = compiled(tmp_path, "--scales", scales, "--sm", "87")
        assert done.returncode == 0, done.stderr[-2000:]
    kernel = find((8, 9), "bfloat16", (2, 3), [tmp_path])
    assert (kernel.facts.sm, kernel.facts.layout.one_pass, kernel.facts.layout.rows) == (87, True, 6)
    assert not find((8, 7), "float32", (1, 3, 5, 8), [tmp_path]).facts.layout.one_pass


def test_ptxas_translates_every_shipped_kernel(tmp_path: Path) -> None:
    spec = triton_spec()
    if spec is None or spec.origin is None:
        pytest.skip("Triton, which brings ptxas, is not installed")
    folder = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
    checked = 0
    for entry in read_index(SHIPPED).kernels:
        ptxas = folder / ("ptxas-blackwell" if entry.sm >= 100 else "ptxas")
        if not ptxas.exists():
            continue
        command = [str(ptxas), f"-arch=sm_{entry.sm}", str(SHIPPED / entry.file), "-o", str(tmp_path / "cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "is not defined for option 'gpu-name'" not in done.stderr:  # an older ptxas
            assert done.returncode == 0, f"{entry.file}: {done.stderr}"
            checked += 1
    print(f"{checked} kernels translated")
    assert checked, "this Triton has no ptxas for any of them"


def test_wrong_use_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for scales in ("0,1", "a", "", "1,,2", "-1", "1.5", "1" * 5000, ",".join("123456789")):
        with pytest.raises(SystemExit, match="2"):
            main(["--scales", scales])
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(
            f"kernels.compile: argument --scales: found {scales!r:.40}, expected 1 to 8 whole numbers"
        )
    with pytest.raises(SystemExit, match="2"):
        main(["--sm", "70"])
    assert len(capsys.readouterr().err.splitlines()) == 1
    (tmp_path / "file").write_text("")
    assert main(["-o", str(tmp_path / "file")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
