"""``bundle_from_checkpoint``: the whole way from a published checkpoint to a bundle.

One stage at a time is loaded, traced, written and let go, so that memory holds one stage's weights. Parses no command
line; ``export.__main__`` does.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from export.checkpoint import Checkpoint
from export.decoder import Decoder
from export.families import Backbone, backbone_from_checkpoint
from export.linvt import LinVT
from export.linvt.layout import LinVTWeights, linvt_from_checkpoint, linvt_from_file
from export.load import load_module
from export.passes import lower_opset, narrow_weights
from export.stages import Stage, aggregate_stage, decode_stage, refine_stage, vision_stage
from export.tokenizer import generation_defaults, stop_ids, token_id, tokenizer_from_checkpoint
from export.trace import onnx_from_stage
from export.write import bundle_draft, file_specs, replace_file, save_graph
from runtime.bundle import MANIFEST
from runtime.errors import CheckpointError, OptionError, OutputError
from runtime.manifest import FrameSpec, Manifest, StageSpec, TensorSpec, encode_manifest
from runtime.text import PromptSpec
from runtime.version import __version__

__all__ = ["ExportOptions", "bundle_from_checkpoint", "choose_linvt"]

Progress = Callable[[str], None]

NO_LINVT = "none"
EMBEDDING = "embedding.safetensors"
TOKENIZER = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
MOST_FRAMES = 512  # with LinVT: bounds the memory of the frame tokens, not the prompt
DEFAULT_FRAMES = 16  # the released evaluation's; 8 without LinVT, as in InternVL2's own example
DEFAULT_FRAMES_PLAIN = 8
TEXT_RESERVE = 1024  # tokens of the context kept for question and answer when frames fill the prompt
FRAME_LABEL = 16  # most tokens of "Frame123: <img></img>" and its newline
NARROW = {"BF16": ir.DataType.BFLOAT16, "F16": ir.DataType.FLOAT16}


@dataclass(frozen=True)
class ExportOptions:
    """What to export.

    Attributes:
        checkpoint: folder or hub id.
        output: the bundle's folder.
        linvt: a LinVT weight file, "none" for the plain image LLM, or None for the weights in the checkpoint.
        frames: frames the runtime takes unless told otherwise.
        layout: "training" puts the video as the released training data did; "video" as its chat does.
        text_input: what LinVT reads as the question; see ``PromptSpec``.
        force: replace a bundle that exists.
    """

    checkpoint: str
    output: Path
    linvt: str | None = None
    frames: int | None = None
    layout: str = "video"
    text_input: Literal["question", "released_slice"] = "question"
    force: bool = False


def bundle_from_checkpoint(options: ExportOptions, progress: Progress = lambda step: None) -> Path:
    """Export; returns the bundle's folder.

    Args:
        options: what to export.
        progress: told the name of each step as it begins.

    Raises:
        CheckpointError, OptionError, OutputError: one line each; the target is as it was.
    """
    with bundle_draft(options.output, force=options.force) as draft:
        progress("checkpoint")
        checkpoint = Checkpoint.open(options.checkpoint)
        backbone = backbone_from_checkpoint(checkpoint)
        weights = choose_linvt(options.linvt, checkpoint, backbone)
        frames = frame_spec(backbone, weights, options.frames)
        prompt = write_text(draft, checkpoint, backbone, weights, options)
        stages = {}
        for stage, stored in traced_stages(checkpoint, backbone, weights, frames, progress):
            stages[stage.name] = write_stage(draft, stage, NARROW.get(stored))
            del stage
        progress("embedding")
        write_embedding(draft, checkpoint, backbone)
        progress("manifest")
        manifest = Manifest(
            family=backbone.family,
            linvt=weights.config if weights else None,
            context=backbone.decoder.context,
            width=backbone.decoder.width,
            layers=backbone.decoder.layers,
            heads_kv=backbone.decoder.heads_kv,
            head_dim=backbone.decoder.head_dim,
            stages=stages,
            frames=frames,
            preprocess=backbone.preprocess,
            prompt=prompt,
            generation=generation_defaults(checkpoint),
            files=file_specs(draft),
            provenance=provenance(checkpoint, options),
        )
        replace_file(draft / MANIFEST, encode_manifest(manifest))
    return options.output


def choose_linvt(choice: str | None, checkpoint: Checkpoint, backbone: Backbone) -> LinVTWeights | None:
    """The LinVT that ``--linvt`` names, or the checkpoint's own."""
    width = backbone.decoder.width
    if choice == NO_LINVT:
        return None
    weights = linvt_from_checkpoint(checkpoint, width) if choice is None else linvt_from_file(choice, checkpoint, width)
    if weights is None:
        raise CheckpointError(
            f"{checkpoint.folder} holds no LinVT weights (query_tokens, linVT.*); give --linvt WEIGHTS, or "
            "--linvt none for the plain image LLM"
        )
    config = weights.config
    if config.positions == "absolute" and config.tokens_per_frame != backbone.tokens_per_frame:
        raise CheckpointError(
            f"LinVT has positions for {config.tokens_per_frame} tokens a frame, the backbone makes "
            f"{backbone.tokens_per_frame}; these LinVT weights belong to another backbone"
        )
    return weights


def frame_spec(backbone: Backbone, weights: LinVTWeights | None, asked: int | None) -> FrameSpec:
    """Fewest, usual and most frames.

    With LinVT the fewest are those that hold ``top_k`` tokens; a shorter video repeats frames. Without, the prompt
    has to fit into the LLM's context.
    """
    tokens = backbone.tokens_per_frame
    if weights:
        least = weights.config.min_frames(tokens)
        most = weights.config.max_frames or max(MOST_FRAMES, least)
        usual = DEFAULT_FRAMES
    else:
        least, usual = 1, DEFAULT_FRAMES_PLAIN
        most = max(1, (backbone.decoder.context - TEXT_RESERVE) // (tokens + FRAME_LABEL))
    if least > most:
        raise CheckpointError(f"LinVT needs {least} frames for its top_k and has positions for {most}")
    if asked is not None and not least <= asked <= most:
        raise OptionError(f"--frames {asked} is outside what the model takes: {least} to {most}")
    return FrameSpec(least, asked or min(max(usual, least), most), most, tokens)


def traced_stages(
    checkpoint: Checkpoint,
    backbone: Backbone,
    weights: LinVTWeights | None,
    frames: FrameSpec,
    progress: Progress,
) -> Iterator[tuple[Stage, str]]:
    """Load and yield one stage after the other, with its stored dtype; the module before is let go."""
    stored = storage_dtype(checkpoint, backbone)
    progress("vision")
    vision = load_module(backbone.vision, checkpoint.tensors, backbone.vision_names)
    yield vision_stage(vision, backbone.preprocess, frames), stored
    del vision
    if weights:
        progress("refine")
        linvt = load_linvt(weights)
        yield refine_stage(linvt, frames), weights.storage
        progress("aggregate")
        yield aggregate_stage(linvt, backbone.decoder.context), weights.storage
        del linvt
    progress("decode")
    yield decode_stage(load_decoder(checkpoint, backbone)), stored


def load_linvt(weights: LinVTWeights) -> LinVT:
    """The LinVT module with its weights."""
    return load_module(lambda: LinVT(weights.config), weights.tensors, weights.names)


def load_decoder(checkpoint: Checkpoint, backbone: Backbone) -> Decoder:
    """The LLM with its weights."""
    return load_module(lambda: Decoder(backbone.decoder), checkpoint.tensors, backbone.decoder_names)


def storage_dtype(checkpoint: Checkpoint, backbone: Backbone) -> str:
    """The dtype the checkpoint's embedding table, and with it usually everything, is stored in."""
    return checkpoint.tensors.dtype(backbone.decoder_names("model.embed_tokens.weight"))


def write_stage(draft: Path, stage: Stage, narrow: ir.DataType | None) -> StageSpec:
    """Trace and write one graph."""
    model = onnx_from_stage(stage)
    narrowed = narrow is not None and narrow_weights(model, narrow)
    file = save_graph(model, draft, stage.name)
    return StageSpec(
        file,
        tuple(map(tensor_spec, model.graph.inputs)),
        tuple(map(tensor_spec, model.graph.outputs)),
        older=(write_older(draft, stage.name),),
        storage=narrow.name.lower() if narrowed and narrow else "float32",  # type: ignore[arg-type]
    )


def write_older(draft: Path, name: str) -> str:
    """Write the graph once more for engines that know opset 23 only, over the same weights; the file's name."""
    model = ir.load(draft / f"{name}.onnx")
    lower_opset(model)
    file = f"{name}.opset{model.opset_imports['']}.onnx"
    ir.save(model, draft / file)
    return file


def tensor_spec(value: ir.Value) -> TensorSpec:
    """The manifest's view of a graph input or output."""
    assert value.name and value.shape is not None and value.dtype is not None
    shape = tuple(axis if isinstance(axis, int) else str(axis.value) for axis in value.shape)
    dtype = "float32" if value.dtype == ir.DataType.FLOAT else value.dtype.name.lower()
    return TensorSpec(value.name, dtype, shape)  # type: ignore[arg-type]


def write_embedding(draft: Path, checkpoint: Checkpoint, backbone: Backbone) -> None:
    """The token embedding table, in the checkpoint's dtype."""
    table = checkpoint.tensors.tensor(backbone.decoder_names("model.embed_tokens.weight"))
    if table.dtype not in (torch.float16, torch.bfloat16):
        table = table.float()
    try:
        save_file({"embedding": table.contiguous()}, draft / EMBEDDING)
    except SafetensorError as error:
        raise OutputError(f"cannot write {draft / EMBEDDING}: {error}") from error
    shutil.copymode(draft / TOKENIZER, draft / EMBEDDING)  # safetensors lets nobody else read what it writes


def write_text(
    draft: Path,
    checkpoint: Checkpoint,
    backbone: Backbone,
    weights: LinVTWeights | None,
    options: ExportOptions,
) -> PromptSpec:
    """Tokenizer and chat template; what the manifest says about them."""
    facts = backbone.prompt
    tokenizer = tokenizer_from_checkpoint(checkpoint, facts)
    (draft / TOKENIZER).write_text(tokenizer.to_str(pretty=True), "utf-8")
    layout = options.layout if weights else "frames"
    if layout not in facts.templates:
        raise OptionError(f"--layout {layout}: {backbone.family} has the layouts {', '.join(facts.templates)}")
    (draft / TEMPLATE).write_text(facts.templates[layout], "utf-8")
    return PromptSpec(
        system=facts.system,
        visual_token=facts.visual_token,
        visual_id=token_id(tokenizer, facts.visual_token),
        stop_ids=stop_ids(checkpoint, tokenizer, facts.end_token),
        reserved=facts.reserved,
        text_input=options.text_input,
    )


def provenance(checkpoint: Checkpoint, options: ExportOptions) -> dict[str, str]:
    """Where the bundle came from: no clock, so that the same export gives the same bundle."""
    return {
        "checkpoint": Path(options.checkpoint).absolute().name,
        "checkpoint_fingerprint": checkpoint.fingerprint(),
        "linvt": Path(options.linvt).name if options.linvt else "checkpoint",
        "linvt-edge": __version__,
        **{name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnxscript")},
    }
