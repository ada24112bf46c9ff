"""The graph of one stage on disk: ``{stage}.onnx``, its weights beside it, and the form for older engines.

Exports and quantised bundles are written by this. Traces and edits nothing but the opset.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from calibration.passes import lower_opset
from runtime.manifest import Compute, StageSpec, Storage, TensorSpec

__all__ = ["write_stage_file"]

EMBEDDED = 1024  # bytes; smaller tensors stay inside the graph's file


def write_stage_file(model: ir.Model, folder: Path, name: str, *, compute: Compute, storage: Storage) -> StageSpec:
    """Write ``{name}.onnx``, ``{name}.onnx.data`` and the older form over the same weights; what the manifest says.

    The model lets go of its weights: the optimizer's rules remember the last graph they saw, and with it gigabytes.
    """
    file = f"{name}.onnx"
    ir.save(model, folder / file, external_data=f"{file}.data", size_threshold_bytes=EMBEDDED)
    for value in model.graph.initializers.values():
        value.const_value = None
    inputs, outputs = (tuple(map(tensor_spec, values)) for values in (model.graph.inputs, model.graph.outputs))
    return StageSpec(file, inputs, outputs, older=(write_older(folder, name),), compute=compute, storage=storage)


def write_older(folder: Path, name: str) -> str:
    """Write the graph once more for engines that know opset 23 only, over the same weights; the file's name."""
    model = ir.load(folder / f"{name}.onnx")
    lower_opset(model)
    file = f"{name}.opset{model.opset_imports['']}.onnx"
    ir.save(model, folder / file)
    return file


def tensor_spec(value: ir.Value) -> TensorSpec:
    """The manifest's view of a graph input or output."""
    assert value.name and value.shape is not None and value.dtype is not None
    shape = tuple(axis if isinstance(axis, int) else str(axis.value) for axis in value.shape)
    dtype = "float32" if value.dtype == ir.DataType.FLOAT else value.dtype.name.lower()
    return TensorSpec(value.name, dtype, shape)  # type: ignore[arg-type]
