"""``bundle_from_checkpoint``: the whole way from a published checkpoint to a bundle.

One stage at a time is loaded, traced, written and let go, so that memory holds one stage's weights. Parses no command
line; ``export.__main__`` does.
"""

from __future__ import annotations

import gc
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
from torch import nn

from calibration.passes import narrow_weights
from calibration.stage_file import write_stage_file
from calibration.write import bundle_draft, file_specs, replace_file
from export.checkpoint import Checkpoint
from export.decoder import Decoder
from export.families import Backbone, backbone_from_checkpoint
from export.families.base import FrameRoute, Route
from export.linvt import LinVT
from export.linvt.layout import LinVTWeights, linvt_from_checkpoint, linvt_from_file
from export.load import load_module
from export.precision import DTYPES, narrowed
from export.stages import Stage, aggregate_stage, decode_stage, refine_stage, vision_stage
from export.tokenizer import generation_defaults, stop_ids, token_id, tokenizer_from_checkpoint
from export.trace import onnx_from_stage
from runtime.bundle import MANIFEST
from runtime.errors import CheckpointError, OptionError, OutputError
from runtime.manifest import FrameSpec, Manifest, StageSpec, encode_manifest
from runtime.positions import PositionSpec
from runtime.text import PromptSpec
from runtime.version import __version__

__all__ = ["ExportOptions", "bundle_from_checkpoint", "choose_linvt"]

Progress = Callable[[str], None]
Dtype = Literal["float32", "float16", "bfloat16"]

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
        image_size: (height, width) in pixels, for families that leave it open.
        route: how frames become tokens, for families that have a way of their own for videos.
        dtype: what vision, aggregate and decode compute in.
    """

    checkpoint: str
    output: Path
    linvt: str | None = None
    frames: int | None = None
    layout: str = "video"
    text_input: Literal["question", "released_slice"] = "question"
    force: bool = False
    image_size: tuple[int, int] | None = None
    route: Route = "images"
    dtype: Dtype = "float32"


def bundle_from_checkpoint(
    options: ExportOptions, progress: Progress = lambda step: None, note: Progress = lambda line: None
) -> Path:
    """Export; returns the bundle's folder.

    Args:
        options: what to export.
        progress: told the name of each step as it begins.
        note: told what was done otherwise than asked.

    Raises:
        CheckpointError, OptionError, OutputError: one line each; the target is as it was.
    """
    with bundle_draft(options.output, force=options.force) as draft:
        progress("checkpoint")
        checkpoint = Checkpoint.open(options.checkpoint)
        backbone = backbone_from_checkpoint(checkpoint, FrameRoute(options.image_size, options.route))
        weights = choose_linvt(options.linvt, checkpoint, backbone)
        if weights and backbone.pooled:
            raise OptionError(
                f"--route {options.route}: {backbone.family} pools its tokens there, and LinVT takes them plain; "
                "leave the option out"
            )
        frames = frame_spec(backbone, weights, options.frames)
        prompt = write_text(draft, checkpoint, backbone, weights, options)
        stages = {}
        for stage, stored in traced_stages(checkpoint, backbone, weights, frames, progress):
            dtype = stage_dtype(stage.name, options.dtype, backbone, note)
            stages[stage.name] = write_stage(draft, narrowed(stage, DTYPES[dtype]), NARROW.get(stored), dtype)
            del stage
        progress("embedding")
        write_embedding(draft, checkpoint, backbone)
        progress("manifest")
        llm = backbone.llm.config
        manifest = Manifest(
            family=backbone.family,
            linvt=weights.config if weights else None,
            context=llm.context,
            width=llm.width,
            layers=llm.layers,
            heads_kv=llm.heads_kv,
            head_dim=llm.head_dim,
            stages=stages,
            frames=frames,
            route=options.route,
            preprocess=backbone.preprocess,
            prompt=prompt,
            positions=position_spec(backbone),
            generation=generation_defaults(checkpoint),
            files=file_specs(draft),
            provenance=provenance(checkpoint, options),
        )
        replace_file(draft / MANIFEST, encode_manifest(manifest))
    return options.output


def choose_linvt(choice: str | None, checkpoint: Checkpoint, backbone: Backbone) -> LinVTWeights | None:
    """The LinVT that ``--linvt`` names, or the checkpoint's own."""
    width = backbone.llm.config.width
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
    tokens, group = backbone.tokens_per_frame, backbone.frame_group
    if weights:
        least = (weights.config.min_frames(tokens) - 1) * group + 1
        most = weights.config.max_frames * group or max(MOST_FRAMES, least)
        usual = DEFAULT_FRAMES
    else:
        least, usual = 1, DEFAULT_FRAMES_PLAIN
        context = backbone.llm.config.context
        reserve = min(TEXT_RESERVE, context // 4)
        most = max(1, (context - reserve) // (tokens + FRAME_LABEL) * group)
    if least > most:
        raise CheckpointError(f"LinVT needs {least} frames for its top_k and has positions for {most}")
    if asked is not None and not least <= asked <= most:
        raise OptionError(f"--frames {asked} is outside what the model takes: {least} to {most}")
    return FrameSpec(least, asked or min(max(usual, least), most), most, tokens, group)


def position_spec(backbone: Backbone) -> PositionSpec:
    """Axes of a position and, with three of them, the grid of one set of tokens."""
    axes = backbone.llm.config.rotary.axes
    assert axes in (1, 3)
    return PositionSpec(3, backbone.grid or (1, 1)) if axes == 3 else PositionSpec()


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
    yield vision_stage(load_vision(checkpoint, backbone), backbone.preprocess, frames), stored
    if weights:
        gc.collect()  # what was traced holds its weights in reference cycles
        progress("refine")
        linvt = load_linvt(weights)
        yield refine_stage(linvt, frames), weights.storage
        progress("aggregate")
        yield aggregate_stage(linvt, backbone.llm.config.context), weights.storage
        del linvt
    gc.collect()
    progress("decode")
    yield decode_stage(load_decoder(checkpoint, backbone)), stored


def load_vision(checkpoint: Checkpoint, backbone: Backbone) -> nn.Module:
    """Tower and connector with their weights."""
    return load_module(backbone.vision, checkpoint.tensors, backbone.vision_names)


def load_linvt(weights: LinVTWeights) -> LinVT:
    """The LinVT module with its weights."""
    return load_module(lambda: LinVT(weights.config), weights.tensors, weights.names)


def load_decoder(checkpoint: Checkpoint, backbone: Backbone) -> Decoder:
    """The LLM with its weights."""
    return load_module(lambda: Decoder(backbone.llm.config), checkpoint.tensors, backbone.llm.names)


def load_table(checkpoint: Checkpoint, backbone: Backbone) -> torch.Tensor:
    """The token embedding table (rows, D) in its stored dtype."""
    llm = backbone.llm
    return llm.table.read(checkpoint.tensors, (llm.table_rows, llm.config.width))


def storage_dtype(checkpoint: Checkpoint, backbone: Backbone) -> str:
    """The dtype the checkpoint's embedding table, and with it usually everything, is stored in."""
    return checkpoint.tensors.dtype(backbone.llm.table.names[0])


def stage_dtype(stage: str, asked: Dtype, backbone: Backbone, note: Progress) -> Dtype:
    """What a stage computes in: as asked, but SVR in float32, and an LLM that leaves float16's range in bfloat16."""
    if stage == "refine":
        return "float32"
    if stage == "decode" and asked == "float16" and backbone.llm.overflows:
        note(f"decode computes in bfloat16, not float16: {backbone.llm.overflows}")
        return "bfloat16"
    return asked


def write_stage(draft: Path, stage: Stage, narrow: ir.DataType | None, dtype: Dtype) -> StageSpec:
    """Trace and write one graph."""
    model = onnx_from_stage(stage)
    wide = dtype == "float32"
    stored_narrow = wide and narrow is not None and narrow_weights(model, narrow)
    storage = narrow.name.lower() if stored_narrow and narrow else dtype
    return write_stage_file(model, draft, stage.name, compute=dtype, storage=storage)  # type: ignore[arg-type]


def write_embedding(draft: Path, checkpoint: Checkpoint, backbone: Backbone) -> None:
    """The token embedding table, in the checkpoint's dtype."""
    table = load_table(checkpoint, backbone)
    if table.dtype not in (torch.float16, torch.bfloat16):
        table = table.float()
    try:
        save_file({"embedding": table.contiguous()}, draft / EMBEDDING)
    except SafetensorError as error:
        raise OutputError(f"cannot write {draft / EMBEDDING}: {error}; check the folder and the disk") from error
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
    stops = stop_ids(checkpoint, tokenizer, facts.end_token)
    if max(stops) >= backbone.llm.table_rows:
        raise CheckpointError(
            f"generation_config.json has eos_token_id {max(stops)}, the vocabulary {backbone.llm.table_rows} rows; "
            "the file is another model's"
        )
    name = options.layout if weights else "frames"
    if name not in facts.layouts:
        raise OptionError(f"--layout {name}: {backbone.family} has the layouts {', '.join(facts.layouts)}")
    layout = facts.layouts[name]
    (draft / TEMPLATE).write_text(layout.template, "utf-8")
    return PromptSpec(
        system=facts.system,
        visual_token=layout.visual_token,
        visual_id=token_id(tokenizer, layout.visual_token),
        image_token=facts.image_token,
        image_id=token_id(tokenizer, facts.image_token),
        stop_ids=stops,
        reserved=facts.reserved,
        text_input=options.text_input,
        add_special_tokens=facts.add_special_tokens,
        rows=dict(facts.prompt_rows),
        merge=backbone.merge,
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
