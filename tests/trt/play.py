"""Plain use of a double, as a tutorial of TensorRT would write it: build, run, memory, a captured graph.

For tests of the double; the project's own code is what other tests run in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.trt.double import Double

__all__ = ["Machine"]

Array = NDArray[Any]
Shapes = Mapping[str, tuple[tuple[int, ...], ...]]


class Machine:
    """A builder, a stream and memory in one double."""

    def __init__(self, double: Double) -> None:
        import tensorrt as trt
        from cuda.bindings import runtime

        self.double = double
        self.trt, self.cuda = trt, runtime
        self.lines: list[tuple[str, str]] = []
        self.logger = self._logger()
        self.builder = trt.Builder(self.logger)
        self.stream = int(self.value(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)))
        self.blocks: list[int] = []

    def _logger(self) -> Any:
        trt, lines = self.trt, self.lines

        class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                lines.append((severity.name, msg))

        return Logger()

    def value(self, answer: tuple[Any, ...]) -> Any:
        """What cuda-python returns besides the error, which there must not be."""
        error, *values = answer
        assert not int(error), error
        return values[0] if values else None

    def network(self) -> Any:
        """A strongly typed network."""
        return self.builder.create_network(1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    def parser(self) -> Any:
        """A parser over a network."""
        return self.trt.OnnxParser(self.network(), self.logger)

    def build(self, path: Path, *profiles: Shapes, config: Any = None, **settings: Any) -> Any:
        """A serialised engine, None where the build failed."""
        network = self.network()
        parser = self.trt.OnnxParser(network, self.logger)
        assert parser.parse_from_file(str(path)), parser.get_error(0).desc()
        config = self.builder.create_builder_config() if config is None else config
        for name, setting in settings.items():
            setattr(config, name, setting)
        for shapes in profiles:
            if shapes:
                profile = self.builder.create_optimization_profile()
                for name, three in shapes.items():
                    profile.set_shape(name, *three)
                config.add_optimization_profile(profile)
        return self.builder.build_serialized_network(network, config)

    def engine(self, path: Path, *profiles: Shapes) -> Any:
        """An engine ready to run."""
        host = self.build(path, *profiles)
        assert host is not None, self.lines
        return self.trt.Runtime(self.logger).deserialize_cuda_engine(host)

    def memory(self, size: int) -> int:
        """Device memory that ``close`` frees."""
        self.blocks.append(self.value(self.cuda.cudaMalloc(size)))
        return self.blocks[-1]

    def free(self, address: int) -> None:
        """Free it now."""
        self.blocks.remove(address)
        self.value(self.cuda.cudaFree(address))

    def write(self, address: int, array: Array) -> None:
        """Host -> device."""
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.value(self.cuda.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, self.stream))

    def peek(self, address: int, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        """What device memory holds now, whoever is still to be waited for."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.double.device.memory.view(address, size, "peek").copy().view(dtype).reshape(shape)

    def finish(self) -> None:
        """Wait for the stream."""
        self.value(self.cuda.cudaStreamSynchronize(self.stream))

    def captured(self, work: Callable[[], Any]) -> Callable[[], None]:
        """Work as a graph; the result launches it."""
        cuda = self.cuda
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.value(cuda.cudaStreamBeginCapture(self.stream, mode))
        try:
            assert work()
        finally:
            error, graph = cuda.cudaStreamEndCapture(self.stream)
        executable = self.value(cuda.cudaGraphInstantiate(self.value((error, graph)), 0))
        return lambda: self.value(cuda.cudaGraphLaunch(executable, self.stream))

    def run(self, context: Any, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs -> outputs, through device memory, waited for."""
        engine = context.engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        made = []
        for name, array in feeds.items():
            assert context.set_input_shape(name, array.shape)
            made.append(self.memory(array.nbytes))
            self.write(made[-1], array)
            assert context.set_tensor_address(name, made[-1])
        assert context.infer_shapes() == []
        shapes = {name: tuple(context.get_tensor_shape(name)) for name in names if name not in feeds}
        kinds = {name: np.dtype(self.trt.nptype(engine.get_tensor_dtype(name))) for name in shapes}
        for name, shape in shapes.items():
            made.append(self.memory(int(np.prod(shape)) * kinds[name].itemsize))
            assert context.set_tensor_address(name, made[-1])
        assert context.execute_async_v3(self.stream)
        self.finish()
        outputs = {name: self.peek(context.get_tensor_address(name), shapes[name], kinds[name]) for name in shapes}
        for address in made:
            self.free(address)
        return outputs

    def close(self) -> None:
        """Free memory and the stream; what a test broke on purpose stays broken."""
        self.double.device.queues.streams[self.stream].queue.clear()
        for address in list(self.blocks):
            self.free(address)
        self.value(self.cuda.cudaStreamDestroy(self.stream))
