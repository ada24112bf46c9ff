"""TensorRT engines beside a bundle: where they lie, what each was built of, and whether it fits this device.

``engines/<gpu>-trt<version>/`` holds ``<stage>.engine`` and ``<stage>.json`` for every stage, in ``ptx`` the kernels of
engines that launch them through this package. An engine belongs to one TensorRT release, one kind of GPU and one graph,
and TensorRT says so only in its log: the record beside it is compared first.

Imports no TensorRT and builds nothing (``export.build`` does).
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec

from kernels.ptx import KernelError
from kernels.register import digest, kernels_for
from runtime.bundle import Bundle, sha256_of
from runtime.errors import BackendError
from runtime.external_data import external_files
from runtime.manifest import JSON_ERRORS, Dtype

__all__ = [
    "ENGINES",
    "PTX",
    "EngineRecord",
    "EngineTensor",
    "PluginRecord",
    "ShapeRange",
    "Target",
    "engine_folder",
    "find_engines",
    "graph_hash",
    "platform_name",
    "read_record",
]

ENGINES = "engines"
PTX = "ptx"
RECORD_VERSION = 1


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an engine is built for and run on.

    Attributes:
        gpu: the device's name.
        sm: its compute capability, e.g. (8, 7).
        processors: its streaming multiprocessors; Jetson's Orin modules differ in these alone.
        tensorrt: release, all of it, e.g. "10.3.0".
        platform: operating system and processor, e.g. "linux-aarch64".
        cuda: newest CUDA of the driver, e.g. (12, 6); shown, not compared.
    """

    gpu: str
    sm: tuple[int, int]
    processors: int
    tensorrt: str
    platform: str
    cuda: tuple[int, int]


class ShapeRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shapes of one input in one optimisation profile."""

    least: tuple[int, ...]
    best: tuple[int, ...]
    most: tuple[int, ...]


class EngineTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One input or output of an engine."""

    name: str
    dtype: Dtype


class PluginRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The plugin inside an engine.

    Attributes:
        kind: "aot" needs nothing at run time, "v3" needs this package's plugin class and the PTX beside the engine.
        sha256: of the PTX (``kernels.register``).
    """

    kind: Literal["aot", "v3"]
    sha256: str


class EngineRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an engine was built of, for what, and how.

    Attributes:
        target: what it was built for.
        graph: ``graph_hash`` of the stage.
        options: all that was asked of the builder, in words; other words are another engine.
        profiles: input shapes by name, in the order of the engine's optimisation profiles.
        inputs, outputs: tensors with the dtype the engine has for them.
        size, sha256: of the engine's file.
        device_memory: bytes of scratch memory it asks for at its largest shapes; 0 where the builder could not tell.
    """

    version: int = RECORD_VERSION
    stage: str
    target: Target
    graph: str
    plugin: PluginRecord | None = None
    options: dict[str, str]
    profiles: tuple[dict[str, ShapeRange], ...]
    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    size: int
    sha256: str
    device_memory: int = 0


def platform_name() -> str:
    """Operating system and processor, e.g. "linux-x86_64"."""
    return f"{platform.system()}-{platform.machine()}".lower()


def engine_folder(bundle: Bundle, target: Target) -> Path:
    """Where this target's engines of a bundle lie, e.g. engines/orin-sm87-trt10.3.0."""
    name = re.sub(r"[^a-z0-9]+", "-", target.gpu.lower().removeprefix("nvidia ")).strip("-") or "gpu"
    release = re.sub(r"[^0-9A-Za-z.]+", "-", target.tensorrt)
    return bundle.folder / ENGINES / f"{name}-sm{target.sm[0]}{target.sm[1]}-trt{release}"


def graph_hash(bundle: Bundle, stage: str) -> str:
    """SHA-256 (hex) over the manifest's hashes of a stage's graph and of the files its weights lie in."""
    file = bundle.manifest.stages[stage].file
    names = {file}
    for name in external_files(bundle.path(file).read_bytes()):
        names.add(str(PurePosixPath(file).parent / name))
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name} {bundle.manifest.files[name].sha256}\n".encode())
    return digest.hexdigest()


def find_engines(bundle: Bundle, target: Target) -> dict[str, EngineRecord]:
    """The record of every stage's engine for this target, checked but for the engine's SHA-256.

    Raises:
        BackendError: a stage has no engine here, or one that does not fit: which of TensorRT, GPU, platform, graph and
            kernels differs, and the command that builds it again.
    """
    folder = engine_folder(bundle, target)
    records = {}
    for stage in bundle.manifest.stages:
        path = folder / f"{stage}.json"
        if not path.is_file():
            missing = f"no {stage} engine" if folder.is_dir() else "no engines"
            raise BackendError(
                f"{bundle.folder} has {missing} for {target.gpu} and TensorRT {target.tensorrt}"
                f"{elsewhere(bundle, folder)}; run: {rebuild(bundle)}"
            )
        record = read_record(path)
        if found := differences(record, bundle, stage, target):
            raise BackendError(
                f"{path.with_suffix('.engine')} does not fit: {'; '.join(found)}; run: {rebuild(bundle)}"
            )
        records[stage] = record
    return records


def read_record(path: Path) -> EngineRecord:
    """The record beside an engine.

    Raises:
        BackendError: it cannot be read, or is of another release's form.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=EngineRecord)
    except (OSError, *JSON_ERRORS) as error:
        raise BackendError(f"{path} is not an engine's record: {error!s:.200}; build the engines again") from error


def differences(record: EngineRecord, bundle: Bundle, stage: str, target: Target) -> Sequence[str]:
    """What an engine is of and what is here, where they are not the same."""
    engine = engine_folder(bundle, target) / f"{stage}.engine"
    size = engine.stat().st_size if engine.is_file() else None
    checks = (
        ("record version", record.version, RECORD_VERSION),
        ("stage", record.stage, stage),
        ("TensorRT", record.target.tensorrt, target.tensorrt),
        ("GPU", described(record.target), described(target)),
        ("platform", record.target.platform, target.platform),
        ("graph", record.graph[:12], graph_hash(bundle, stage)[:12]),
        ("size", f"{record.size} bytes", "no file" if size is None else f"{size} bytes"),
    )
    found = [f"it is of {what} {built}, here is {found}" for what, built, found in checks if built != found]
    if record.plugin and record.plugin.kind == "v3":
        found += kernel_differences(record.plugin, bundle, stage, target)
    return found


def kernel_differences(plugin: PluginRecord, bundle: Bundle, stage: str, target: Target) -> list[str]:
    """What is wrong with the kernels beside an engine that launches them through this package."""
    linvt, folder = bundle.manifest.linvt, engine_folder(bundle, target) / PTX
    if linvt is None:
        return ["it has a plugin, and this bundle has no LinVT"]
    try:
        dtypes = [bundle.manifest.stages[stage].compute]
        kernels = kernels_for(target.sm, [folder], scales=linvt.pool_scales, dtypes=dtypes)
    except KernelError as error:
        return [f"its kernels cannot be read: {error}"]
    here = digest(plugin.kind, kernels)
    return [] if here == plugin.sha256 else [f"it is of kernels {plugin.sha256[:12]}, here is {here[:12]}"]


def described(device: Target) -> str:
    """What a GPU is told by."""
    return f"{device.gpu} (compute capability {device.sm[0]}.{device.sm[1]}, {device.processors} multiprocessors)"


def check_contents(engine: Path, record: EngineRecord) -> None:
    """Hash an engine's file.

    Raises:
        BackendError: it is not the one that was built.
    """
    if sha256_of(engine) != record.sha256:
        raise BackendError(f"{engine} is altered: its SHA-256 is not its record's; build the engines again")


def elsewhere(bundle: Bundle, folder: Path) -> str:
    """What engines there are for other targets."""
    others = sorted(path.name for path in (bundle.folder / ENGINES).glob("*-trt*") if path.is_dir() and path != folder)
    return f" (there are some for {', '.join(others)})" if others else ""


def rebuild(bundle: Bundle) -> str:
    """The command that builds engines."""
    return f"python -m export.build {bundle.folder}"
