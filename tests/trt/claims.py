"""Expressions about ``trt`` that need no libraries, and what becomes of each: its text, or the kind of error.

Run over the real bindings and over a double, the answers are to be the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["SETUP", "answers"]

SETUP = """
class Sloppy(trt.ILogger):
    def __init__(self): pass
class Kept(trt.ILogger):
    def __init__(self): trt.ILogger.__init__(self)
    def log(self, severity, msg): pass
class Creator(trt.IPluginCreatorV3One):
    def __init__(self): trt.IPluginCreatorV3One.__init__(self); self.name = "one"
def put(target, name, value):
    setattr(target, name, value)
    return True
"""

EXPRESSIONS = """
trt.Dims((1, 2, 3))
tuple(trt.Dims([1, 2]))
len(trt.Dims(())), trt.Dims((4, 5))[1], trt.Dims((4, 5, 6))[1:]
trt.Dims((1, 2)) == (1, 2)
trt.Dims((1, 2)) == [1, 3]
trt.Dims((1, 2)) == trt.Dims((1, 2))
trt.Dims((1, 2.5))
trt.Dims("ab")
trt.Dims((1,) * 9)
trt.Dims((1, 2))[2]
put(trt.Dims((1,)), "extra", 1)
trt.DataType.FLOAT, repr(trt.DataType.FLOAT), int(trt.DataType.INT8)
trt.DataType.FLOAT == 0
trt.DataType.FLOAT == trt.float32
trt.float32 is trt.DataType.FLOAT
trt.DataType.FLOAT.name, trt.DataType.FLOAT.value
trt.DataType(0)
trt.DataType("FLOAT")
sorted(trt.MemoryPoolType.__members__)
hash(trt.DataType.INT8) == hash(int(trt.DataType.INT8))
trt.BuilderFlag.NOTHING
trt.nothing
trt.Logger.Severity is trt.ILogger.Severity
trt.Logger.WARNING == trt.ILogger.WARNING == trt.Logger.Severity.WARNING
trt.Logger(3)
trt.Logger(trt.Logger.ERROR).min_severity
put(trt.Logger(), "min_severity", 1)
put(trt.Logger(), "min_severity", trt.Logger.INFO)
put(trt.Logger(), "extra", 1)
trt.Logger().log(1, "text")
trt.Logger().log(trt.Logger.VERBOSE, 5)
trt.Logger().log(trt.Logger.VERBOSE, "text", 1)
trt.Logger().log(severity=trt.Logger.VERBOSE, msg="text")
trt.Logger().log(level=trt.Logger.VERBOSE, msg="text")
Sloppy()
type(Kept()).__name__
put(Kept(), "extra", 1)
Creator().name
put(Creator(), "name", 5)
put(Creator(), "plugin_version", "1")
put(Creator(), "field_names", trt.PluginFieldCollection([]))
trt.IBuilderConfig()
trt.INetworkDefinition()
trt.IHostMemory()
trt.ICudaEngine()
trt.Builder("logger")
trt.Builder()
trt.Builder(Kept(), 1)
trt.Builder(log=Kept())
trt.Runtime(5)
trt.OnnxParser(5, Kept())
trt.PluginField("a", np.array([7], np.int32), trt.PluginFieldType.INT32).data.tolist()
trt.PluginField("a", np.array([7], np.int32), trt.PluginFieldType.INT32).size
trt.PluginField("a").type
trt.PluginField("a", 5)
trt.PluginField("a", np.array([7], np.int32), 5)
[field.name for field in trt.PluginFieldCollection([trt.PluginField("a"), trt.PluginField("b")])]
len(trt.PluginFieldCollection([trt.PluginField("a")]))
trt.PluginFieldCollection([])[0]
len(trt.DimsExprs(3))
trt.DimsExprs("abc")
put(trt.PluginTensorDesc(), "type", trt.DataType.HALF)
put(trt.PluginTensorDesc(), "type", 1)
put(trt.PluginTensorDesc(), "dims", (1, 2))
put(trt.PluginTensorDesc(), "dims", 5)
put(trt.PluginTensorDesc(), "scale", "big")
put(trt.PluginTensorDesc(), "format", trt.TensorFormat.LINEAR)
put(trt.PluginTensorDesc(), "shape", (1, 2))
trt.volume((2, 3)), trt.volume(trt.Dims((4,)))
trt.nptype(trt.float16), trt.nptype(trt.bool)
trt.nptype(trt.bfloat16)
trt.nptype(1)
trt.IProgressMonitor.phase_start is not None
hasattr(trt.IExecutionContext, "execute_async_v3"), hasattr(trt.IExecutionContext, "execute_async_v9")
"""


def answers(trt: Any) -> list[str]:
    """One line for each expression."""
    names: dict[str, Any] = {"trt": trt, "np": np}
    exec(SETUP, names)
    return [f"{line}  ->  {answer(line, names)}" for line in EXPRESSIONS.strip().splitlines()]


def answer(line: str, names: dict[str, Any]) -> str:
    try:
        return str(eval(line, names))
    except (TypeError, AttributeError, ValueError, IndexError, RuntimeError, KeyError) as error:
        return type(error).__name__


if __name__ == "__main__":
    import tensorrt

    print("\n".join(answers(tensorrt)))
