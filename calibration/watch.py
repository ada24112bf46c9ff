"""A backend that looks on: the runtime answers as ever, and the activations of every stage are shown to an observer.

So clips are decoded, sampled, resized, encoded and answered by the runtime's own code. Keeps nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from runtime.backend import Array
from runtime.backend_ort import (
    EXACT_INT8,
    OrtBackend,
    OrtDecoder,
    OrtGraph,
    create_session,
    products_saturate,
    translated,
)
from runtime.bundle import Bundle
from runtime.errors import BackendError

__all__ = ["Form", "InMemory", "WatchingBackend", "loaded", "watched_session"]

Look = Callable[[str, Mapping[str, Array], Mapping[str, Array]], None]  # stage, inputs, outputs and activations

FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class InMemory:
    """A serialised graph whose large weights lie in files of ``folder``."""

    model: bytes
    folder: Path


Form: TypeAlias = "Path | InMemory"


class WatchingBackend(OrtBackend):
    """ONNX Runtime on the CPU, with activations of every stage among what a run gives to ``look``."""

    def __init__(self, bundle: Bundle, taps: Mapping[str, Collection[str]], look: Look, threads: int | None) -> None:
        """``taps`` are names of tensors by stage."""
        super().__init__(bundle, "cpu", threads)
        self.taps = taps
        self.look = look

    def graph(self, stage: str) -> WatchingGraph:
        """The stage's graph."""
        return WatchingGraph(self.session(stage), stage, self.look)

    def decoder(self, capacity: int) -> WatchingDecoder:
        """A decoder with an empty cache of its own."""
        decoder = WatchingDecoder(self.session("decode"), self.bundle.manifest, self.name, capacity)
        decoder.watch(tuple(self.taps.get("decode", ())), self.look)
        return decoder

    def session(self, stage: str) -> ort.InferenceSession:
        """The stage's session, which gives the tapped tensors too."""
        if self.closed:
            raise BackendError("the backend is closed; open the bundle again")
        if stage not in self.sessions:
            spec = self.bundle.manifest.stages[stage]
            paths = [self.bundle.path(file) for file in (spec.file, *spec.older)]
            self.sessions[stage] = watched_session(paths, self.taps.get(stage, ()), self.threads)
        return self.sessions[stage]


def watched_session(forms: Sequence[Form], taps: Collection[str], threads: int | None) -> ort.InferenceSession:
    """Load the first form of a graph that this ONNX Runtime knows, with the tensors ``taps`` as further outputs."""
    for form in forms:
        model, folder = loaded(form)
        given = {output.name for output in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in taps if name not in given)
        try:
            with translated(f"load {model.graph.name}", "export the bundle again, or install a newer onnxruntime"):
                entries = {FOLDER: str(folder), **exact_entries(model)}
                return create_session(model.SerializeToString(), "cpu", threads, entries)
        except BackendError as error:
            if form is forms[-1] or "opset" not in str(error.__cause__).lower():
                raise
    raise AssertionError("a stage has at least one form")


def exact_entries(model: onnx.ModelProto) -> dict[str, str]:
    """What the runtime sets for W8A8, which alone quantises activations."""
    narrow = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    return dict([EXACT_INT8]) if narrow and products_saturate() else {}


def loaded(form: Form) -> tuple[onnx.ModelProto, Path]:
    """A graph without its large weights, and the folder these lie in."""
    if isinstance(form, InMemory):
        return onnx.load_from_string(form.model), form.folder
    return onnx.load(str(form), load_external_data=False), form.parent


class WatchingGraph(OrtGraph):
    """A stage whose runs are looked at."""

    def __init__(self, session: ort.InferenceSession, stage: str, look: Look) -> None:
        super().__init__(session, stage)
        self.look = look

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs by name -> outputs by name, the tapped ones among them."""
        values = super().run(feeds)
        self.look(self.stage, feeds, values)
        return values


class WatchingDecoder(OrtDecoder):
    """The LLM, whose steps are looked at."""

    def watch(self, taps: tuple[str, ...], look: Look) -> None:
        """Have the tensors ``taps`` computed with every step."""
        self.taps, self.look = taps, look
        self.bind_taps()

    def bind_taps(self) -> None:
        """Ask for memory of the right size anew: what the step before left has its number of rows."""
        for name in self.taps:
            self.binding.bind_output(name, "cpu")

    def step(self, embeds: NDArray[np.float32], position_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append rows (S, D) at positions (axes, S) -> logits (V,) of the last row."""
        self.bind_taps()
        logits = super().step(embeds, position_ids)
        bound = self.binding.get_outputs()  # in the order of binding: logits, taps, cache
        seen = {name: value.numpy() for name, value in zip(self.taps, bound[1:], strict=False)}
        self.look("decode", {"inputs_embeds": embeds, "position_ids": position_ids}, {"logits": logits, **seen})
        return logits
