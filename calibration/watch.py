"""A backend that looks on: the runtime answers as ever, and the activations of every stage are shown to an observer.

So clips are decoded, sampled, resized, encoded and answered by the runtime's own code. Keeps nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from runtime.backend import Array, Tensor
from runtime.backend_ort import (
    EXACT_INT8,
    OrtBackend,
    OrtDecoder,
    OrtGraph,
    create_session,
    products_saturate,
    written,
)
from runtime.bundle import Bundle
from runtime.errors import BackendError
from runtime.ort_errors import translated

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
    """ONNX Runtime on the CPU, with activations of every stage among what a run gives to ``look``.

    Frames go through vision one group at a time: the activations of a batch would take gigabytes.
    """

    def __init__(
        self,
        bundle: Bundle,
        taps: Mapping[str, Collection[str]],
        look: Look,
        threads: int | None,
        done: Look = lambda stage, feeds, outputs: None,
    ) -> None:
        """Open nothing yet.

        Args:
            bundle: a float bundle.
            taps: names of tensors by stage.
            look: shown these, as they are computed.
            threads: compute threads.
            done: shown what a stage took and gave, without these, when it is finished.
        """
        super().__init__(bundle, "cpu", threads)
        self.taps = taps
        self.look = look
        self.done = done

    def graph(self, stage: str) -> WatchingGraph:
        """The stage's graph."""
        manifest = self.bundle.manifest
        outputs = [output.name for output in manifest.stages[stage].outputs]
        piece = manifest.frames.group if stage == "vision" and self.taps.get(stage) else None
        return WatchingGraph(self.session(stage), stage, self.look, self.done, outputs, piece)

    def decoder(self, capacity: int) -> WatchingDecoder:
        """A decoder with an empty cache of its own."""
        decoder = WatchingDecoder(self.session("decode"), self.bundle.manifest, self.name, capacity)
        decoder.watch(tuple(self.taps.get("decode", ())), self.look, self.done)
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

    def __init__(
        self,
        session: ort.InferenceSession,
        stage: str,
        look: Look,
        done: Look,
        outputs: Sequence[str],
        piece: int | None,
    ) -> None:
        """``piece`` is how much of the inputs' first axis runs at a time; None for all."""
        super().__init__(session, stage)
        self.look, self.done = look, done
        self.given, self.piece = outputs, piece

    def run(self, feeds: Mapping[str, Tensor], outputs: Mapping[str, Tensor] | None = None) -> dict[str, Array]:
        """Inputs by name -> outputs by name; those given are written in place."""
        found: dict[str, list[Array]] = {name: [] for name in self.given}
        taken = {name: np.asarray(value) for name, value in feeds.items()}
        for part in parts(taken, self.piece):
            values = super().run(part)
            self.look(self.stage, part, values)
            for name, kept in found.items():
                kept.append(values[name])
        whole = {name: kept[0] if len(kept) == 1 else np.concatenate(kept) for name, kept in found.items()}
        self.done(self.stage, taken, dict(whole))
        return written(whole, outputs)


def parts(feeds: Mapping[str, Array], piece: int | None) -> Iterator[Mapping[str, Array]]:
    """Inputs cut along their first axis."""
    if piece is None:
        yield feeds
        return
    for start in range(0, len(next(iter(feeds.values()))), piece):
        yield {name: value[start : start + piece] for name, value in feeds.items()}


class WatchingDecoder(OrtDecoder):
    """The LLM, whose steps are looked at."""

    def watch(self, taps: tuple[str, ...], look: Look, done: Look) -> None:
        """Have the tensors ``taps`` computed with every step."""
        self.taps, self.look, self.done = taps, look, done
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
        feeds: dict[str, Array] = {"inputs_embeds": embeds, "position_ids": position_ids}
        self.look("decode", feeds, {"logits": logits, **seen})
        self.done("decode", feeds, {"logits": logits})
        return logits
