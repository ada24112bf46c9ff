"""A functional double of TensorRT and cuda-python, made from the surface of a real version, for tests on a CPU.

Inside ``with Double(...)`` ``import tensorrt`` and ``import cuda.bindings.runtime`` give modules that have what the
real ones have and no more, bind arguments as the real ones do, and work: engines are built of ONNX files and computed
by ONNX Runtime, device memory is host memory, streams are queues whose work is done when something waits for it.

Work is done as late as possible; with ``hurry`` (a random generator) some of it is done at every call, so that the same
answers both ways say that nothing depends on luck.

Attributes for tests: ``calls`` (every call, in order), ``leaks()``, ``log_lines``, ``refuse`` (operator or node ->
why the parser refuses it), ``fail_build`` (why the builder fails), ``fuses_attention`` (whether
there is a fused kernel for attention that is not decomposable), ``builds``, ``engines`` and ``contexts`` alive.

Says nothing about speed, precision or what a real parser takes.
"""

from __future__ import annotations

import gc
import importlib.machinery
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx

from tests.trt.bindings import cuda_surface, surface, tensorrt_site
from tests.trt.build_side import BuilderBehaviour, Registry
from tests.trt.cuda_calls import CudaCalls, Facts
from tests.trt.cuda_module import Handle, NotModelledError, cuda_module
from tests.trt.driver_calls import DriverCalls, KernelFunction, Launch
from tests.trt.expressions import DimsExprs, Field, FieldCollection
from tests.trt.network import NetworkBehaviour, ParserBehaviour
from tests.trt.plan import NUMPY
from tests.trt.plugin_body import with_bodies
from tests.trt.run_side import ContextBehaviour, EngineBehaviour, RuntimeBehaviour
from tests.trt.streams import CallError, Stream, Work
from tests.trt.trt_module import Maker
from tests.trt.trt_values import Dims, Value

__all__ = ["Double", "Recorded"]

MODULES = ("tensorrt", "cuda")  # they and everything below them are taken away and put back


class Recorded(NamedTuple):
    """One call."""

    name: str  # "cudaMalloc", "Builder.create_network", "IBuilderConfig.max_aux_streams="
    arguments: dict[str, Any]  # by the real signature's names; objects and buffers as "<IHostMemory>"


class Double:
    """One machine with one GPU; used once, as a context manager."""

    def __init__(
        self,
        version: str = "10.3.0",
        *,
        sm: tuple[int, int] = (8, 7),
        name: str = "Orin",
        memory: int = 8 << 30,
        cuda: str = "12.6.2.post1",
        integrated: bool = True,
        old_cuda: bool = False,
        hurry: np.random.Generator | None = None,
    ) -> None:
        self.version = version
        self.release = tuple(int(part) for part in version.split(".")[:2])
        self.facts = Facts(name, sm, memory, integrated, cuda)
        self.device = CudaCalls(self.facts)
        self.driver = DriverCalls(self.device)
        self.calls: list[Recorded] = []
        self.failures: list[AssertionError] = []
        self.log_lines: list[tuple[str, str]] = []
        self.refuse: dict[str, str] = {}
        self.fail_build: str | None = None
        self.fuses_attention = True
        self.builds: list[tuple[NetworkBehaviour, Any, Any]] = []
        self.parsed: list[onnx.ModelProto] = []
        self.registry = Registry()
        self.builder_logger: Any = None
        self.engines: weakref.WeakSet[EngineBehaviour] = weakref.WeakSet()
        self.contexts: weakref.WeakSet[ContextBehaviour] = weakref.WeakSet()
        self.pending: list[tuple[tuple[int, int], Stream, weakref.ref[Work]]] = []  # executions, by scratch memory
        self.hurry = hurry
        self.lock = threading.RLock()
        self._aside: dict[str, Any] = {}
        self._marks = 0
        self._old_cuda = old_cuda
        maker = Maker("tensorrt", surface(version).tensorrt, self, version)
        self.trt, self.bare, self.blank = maker.module, maker.bare, maker.blank
        self._dressed = maker.dressed
        self._make_cuda(cuda)

    # The context manager

    def __enter__(self) -> Double:
        forget_modules_of_ours()
        gc.freeze()  # what was there before need not be looked at again and again
        self._aside = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in MODULES}
        for name, module in self._modules().items():
            module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=hasattr(module, "__path__"))
            sys.modules[name] = module
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        gc.collect()
        if not any(name in self._aside for name in MODULES):  # not inside another double
            gc.unfreeze()
        for name in list(sys.modules):
            if name.split(".")[0] in MODULES:
                del sys.modules[name]
        sys.modules.update(self._aside)
        forget_modules_of_ours()
        if self.failures and kind is None:
            raise AssertionError(f"misuse that nobody saw: {self.failures[0]}") from self.failures[0]

    def leaks(self) -> list[str]:
        """What is allocated or alive and should not be, when everything was closed."""
        gc.collect()
        engines = [f"engine {engine.name}" for engine in self.engines]
        return self.device.live() + engines + ["execution context" for _ in self.contexts]

    # Behaviours of ``tensorrt``

    def constructed(self, name: str, arguments: dict[str, Any]) -> Any:
        """The behaviour of a new object."""
        made: Callable[..., Any] | None = {
            "Builder": BuilderBehaviour,
            "OnnxParser": ParserBehaviour,
            "Runtime": RuntimeBehaviour,
            "Logger": LoggerBehaviour,
            "DimsExprs": DimsExprs,
            "PluginField": Field,
            "PluginFieldCollection": FieldCollection,
            "PluginFieldCollection_": FieldCollection,
        }.get(name)
        return made(self, **arguments) if made else None

    def called(self, name: str, arguments: dict[str, Any]) -> None:
        """Record a call."""
        with self.lock:
            self.calls.append(Recorded(name, {key: light(value) for key, value in arguments.items()}))
            if self.hurry is not None:
                self.device.queues.hurry(self.hurry)

    def function(self, name: str, arguments: dict[str, Any]) -> Any:
        """A function of the module ``tensorrt``."""
        if name in ("get_plugin_registry", "get_builder_plugin_registry"):
            return self.registry
        if name == "init_libnvinfer_plugins":
            return True
        if name == "get_nv_onnx_parser_version":
            return self.release[0] * 10000 + self.release[1] * 100
        if name == "volume":
            return int(np.prod(list(arguments["iterable"]), dtype=np.int64))
        if name == "nptype":
            kind = NUMPY.get(getattr(arguments["trt_type"], "name", ""))
            if kind is None:
                raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
            return kind
        raise NotModelledError(f"the double does not model tensorrt.{name}")

    # What behaviours ask for

    def log(self, logger: Any, severity: str, text: str) -> None:
        """Write a line to a user's logger, and keep it."""
        self.log_lines.append((severity, text))
        level = getattr(self.trt.ILogger.Severity, severity)
        if logger is not None:
            logger.log(level, text)

    def dress(self, behaviour: Any) -> Any:
        """The object that users see of a behaviour."""
        return self._dressed(behaviour, ())

    def reclaim(self, address: int, what: str) -> None:
        """Take back memory of an engine or context that is gone."""
        self.device.memory.free(address, "device", what)

    def scribble(self) -> int:
        """A byte to overwrite scratch memory with, another one each time."""
        self._marks = (self._marks + 37) % 251
        return self._marks

    def runnable(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """The model with a body for every plugin."""
        return with_bodies(model)

    def kernel(self, entry: str, computes: KernelFunction) -> None:
        """Say what a kernel computes, for launches through the driver API."""
        self.driver.kernels[entry] = computes

    @property
    def launches(self) -> list[Launch]:
        """Kernels launched so far."""
        return self.driver.launches

    # The modules

    def _make_cuda(self, version: str) -> None:
        found = cuda_surface(version)
        self.cuda_driver = cuda_module("cuda.bindings.driver", found.driver, self._performs(self.driver))
        handles = {name: kind for name, kind in vars(self.cuda_driver).items() if isinstance(kind, type)}
        self.cuda_runtime = cuda_module("cuda.bindings.runtime", found.runtime, self._performs(self.device), handles)
        self.driver.module, self.device.module = self.cuda_driver, self.cuda_runtime

    def _performs(self, calls: Any) -> Callable[[str, dict[str, Any]], tuple[Any, ...]]:
        def perform(name: str, arguments: dict[str, Any]) -> tuple[Any, ...]:
            with self.lock:
                self.called(name, arguments)
                return self._answer(calls, name, arguments)

        return perform

    def _answer(self, calls: Any, name: str, arguments: dict[str, Any]) -> tuple[Any, ...]:
        """(error, values...) as cuda-python returns them."""
        if not hasattr(calls, name):
            raise NotModelledError(f"the double does not model {name}")
        driver = calls is self.driver
        errors = self.cuda_driver.CUresult if driver else self.cuda_runtime.cudaError_t
        try:
            result = getattr(calls, name)(**arguments)
        except CallError as refused:
            found = cuda_surface(self.facts.cuda)
            returns = (found.driver if driver else found.runtime).functions[name].returns
            return (getattr(errors, refused.name), *(None,) * (len(returns) - 1))
        except AssertionError as failure:
            self.failures.append(failure)
            raise
        values = () if result is None else result if isinstance(result, tuple) else (result,)
        return (errors(0), *values)

    def _modules(self) -> dict[str, Any]:
        cuda, bindings = types.ModuleType("cuda"), types.ModuleType("cuda.bindings")
        cuda.__path__, bindings.__path__ = [], []
        made = {"tensorrt": self.trt, "cuda": cuda}
        if surface(self.version).plugin is not None:  # Python: the real files, over this module
            self.trt.__path__ = [str(tensorrt_site(self.version) / "tensorrt_bindings")]
        if self._old_cuda:
            cuda.cudart, cuda.cuda = self.cuda_runtime, self.cuda_driver  # type: ignore[attr-defined]
            return {**made, "cuda.cudart": self.cuda_runtime, "cuda.cuda": self.cuda_driver}
        bindings.runtime, bindings.driver = self.cuda_runtime, self.cuda_driver  # type: ignore[attr-defined]
        cuda.bindings = bindings  # type: ignore[attr-defined]
        return {
            **made,
            "cuda.bindings": bindings,
            "cuda.bindings.runtime": self.cuda_runtime,
            "cuda.bindings.driver": self.cuda_driver,
        }


class LoggerBehaviour:
    """``Logger``: lines go nowhere, ``Double.log_lines`` has them."""

    face = "Logger"

    def __init__(self, world: Double, min_severity: Any = None) -> None:
        self.min_severity = world.trt.ILogger.Severity.WARNING if min_severity is None else min_severity

    def log(self, severity: Any, msg: str) -> None:
        """Nothing."""


def light(value: Any) -> Any:
    """What is kept of an argument: values themselves, of objects and buffers only their kind."""
    if isinstance(value, tuple | list):
        return tuple(map(light, value))
    if isinstance(value, Dims):
        return tuple(value)
    return value if isinstance(value, int | float | str | Value | Handle | type(None)) else f"<{type(value).__name__}>"


def forget_modules_of_ours() -> None:
    """Let ``kernels`` look for CUDA and TensorRT again."""
    cuda = sys.modules.get("kernels.cuda")
    for name in ("runtime", "driver"):
        found = getattr(cuda, name, None)
        if found is not None:
            found.cache_clear()
