"""TensorRT behind the backend protocol: engines that were built on this device, on one stream of their own.

Records are compared before an engine is opened; engines are opened when they are first needed, with ``low_memory`` one
at a time. Builds nothing (``export.build`` does), and decides nothing about frames or tokens.
"""

from __future__ import annotations

from runtime.bundle import Bundle
from runtime.choose_backend import Engines
from runtime.device_tensor import DeviceTensor
from runtime.engines import PTX, EngineRecord, PluginRecord, check_contents, engine_folder, rebuild
from runtime.errors import BackendError
from runtime.limits import limits_of_engines
from runtime.trt_decoder import SlotPool, TrtDecoder
from runtime.trt_device import TrtDevice, translated
from runtime.trt_engine import TrtEngine, TrtGraph

__all__ = ["TrtBackend"]


class TrtBackend:
    """The engines of one bundle."""

    def __init__(
        self, bundle: Bundle, engines: Engines, *, reason: str = "", low_memory: bool = False, verify: bool = False
    ) -> None:
        """Open nothing yet.

        Args:
            bundle: a checked bundle.
            engines: its engines for this device.
            reason: why it is this backend.
            low_memory: hold one engine at a time; a decoder in use keeps its own.
            verify: hash the engines.

        Raises:
            BackendError: an engine has other tensors than the bundle, was altered, or TensorRT does not start.
        """
        self.name = "tensorrt"
        self.reason = reason
        self.notes: list[str] = []
        self.bundle = bundle
        self.low_memory = low_memory
        self.folder = engine_folder(bundle, engines.target)
        self.sm = engines.target.sm
        self.records = engines.records
        for stage, record in self.records.items():
            self.check(stage, record, verify=verify)
        self.limits = limits_of_engines(bundle.manifest, self.records)
        self.opened: TrtDevice | None = TrtDevice(engines.trt)
        self.engines: dict[str, TrtEngine] = {}
        self.pool = SlotPool(self.notes, keep=not low_memory)

    def check(self, stage: str, record: EngineRecord, *, verify: bool) -> None:
        """An engine is one that this runtime opens, with the manifest's tensors."""
        path = self.folder / f"{stage}.engine"
        if verify:
            check_contents(path, record)
        spec = self.bundle.manifest.stages[stage]
        for found, wanted in ((record.inputs, spec.inputs), (record.outputs, spec.outputs)):
            if {tensor.name for tensor in found} != {tensor.name for tensor in wanted}:
                raise BackendError(f"{path} has other tensors than bundle.json says; run: {self.command}")

    @property
    def device(self) -> TrtDevice:
        """What the engines share; after ``close`` a ``BackendError``."""
        if self.opened is None:
            raise BackendError("the backend is closed; open the bundle again")
        return self.opened

    @property
    def command(self) -> str:
        """What builds the engines again."""
        return rebuild(self.bundle)

    def graph(self, stage: str) -> TrtGraph:
        """The stage's graph, opened on first use and kept, or with ``low_memory`` until another one is asked for."""
        return TrtGraph(self.engine(stage))

    def decoder(self, capacity: int) -> TrtDecoder:
        """A decoder with an empty cache of its own, which may come to hold ``capacity`` tokens."""
        return TrtDecoder(self.engine("decode"), self.bundle.manifest, self.pool, capacity)

    def empty(self, shape: tuple[int, ...]) -> DeviceTensor:
        """Memory for float32 values on the device."""
        return self.device.empty(shape)

    def finish(self) -> None:
        """Wait until everything that graphs were asked for is done."""
        self.device.finish()

    def close(self) -> None:
        """Free engines and memory; tensors that somebody still has stay."""
        if self.opened is None:
            return
        self.opened.settle()
        self.pool.close()
        self.engines.clear()
        self.opened.close()
        self.opened = None

    def engine(self, stage: str) -> TrtEngine:
        """The stage's engine."""
        device = self.device
        if stage not in self.engines:
            if self.low_memory:
                device.finish()
                self.engines.clear()
            record = self.records[stage]
            if record.plugin and record.plugin.kind == "v3":
                self.register_plugin(stage, record.plugin)
            self.engines[stage] = TrtEngine(device, self.folder / f"{stage}.engine", record, self.command)
            warnings = (f"TensorRT says of {stage}.engine: {line}" for line in device.log.warnings())
            self.notes += [note for note in warnings if note not in self.notes]
        return self.engines[stage]

    def register_plugin(self, stage: str, plugin: PluginRecord) -> None:
        """Make the plugin's class known, which an engine of an older TensorRT asks for when it is opened.

        Its kernels are those beside the engines, which were compared with the record.

        Raises:
            BackendError: it cannot be.
        """
        from kernels.register import register

        linvt = self.bundle.manifest.linvt
        assert linvt is not None, "the plugin is LinVT's"
        with translated("register the plugin"):
            dtypes = [self.bundle.manifest.stages[stage].compute]
            found = register(self.sm, [self.folder / PTX], scales=linvt.pool_scales, dtypes=dtypes)
        if found.kind != "v3":
            raise BackendError(
                f"the {stage} engine wants LinVT's plugin, which cannot be had here: {found.reason}; "
                f"run: {self.command} --no-plugin"
            )
        assert found.sha256 == plugin.sha256, "the engines were compared"
