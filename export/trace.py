"""``onnx_from_stage``: a stage module -> an ONNX model in memory.

Traces with ``torch.onnx.export`` at opset 24, then keeps parameter names on the weights, gives every linear layer the
form MatMul(x, weight), and removes constants' arithmetic. Writes no file; graph edits are in ``export.passes``.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch

from export.passes import attach_gather_pool, fold_constants, transpose_weights
from export.stages import Stage
from runtime.errors import CheckpointError

__all__ = ["OPSET", "onnx_from_stage"]

OPSET = 24


def onnx_from_stage(stage: Stage) -> ir.Model:
    """Trace ``stage``; inputs and outputs get the stage's names."""
    with quiet(), torch.no_grad(), translated(stage):
        program = torch.onnx.export(
            stage.module.eval(),
            stage.example,
            dynamo=True,
            opset_version=OPSET,
            input_names=stage.inputs,
            output_names=stage.outputs,
            dynamic_shapes=dynamic_shapes(stage),
            optimize=False,
            verbose=False,
        )
    assert program is not None, "export to memory returns a program"
    model = program.model
    model.graph.name = stage.name
    transpose_weights(model)  # before folding, which would take small weights' names
    fold_constants(model)
    transpose_weights(model)  # after it: a slice of everything stood between some weights and their Transpose
    attach_gather_pool(model)
    drop_traces(model)
    return model


def dynamic_shapes(stage: Stage) -> tuple[Any, ...]:
    """The stage's free axes as ``torch.export`` wants them; variadic inputs are one nested tuple."""
    shapes, flat = stage.axes, stage.named_inputs
    return (*shapes[:flat], tuple(shapes[flat:])) if flat < len(shapes) else shapes


def drop_traces(model: ir.Model) -> None:
    """Remove the tracer's notes: stack traces hold paths of the machine that exported."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()


@contextlib.contextmanager
def translated(stage: Stage) -> Iterator[None]:
    """Turn the tracer's errors into one line."""
    try:
        yield
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise CheckpointError(
            f"stage {stage.name} could not be traced: {reason:.200}; check the numbers in config.json, and report it "
            "where they are as published"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the tracer's notes off the user's screen; its errors still arrive."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
