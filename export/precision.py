"""A stage that computes in 16 bits, for GPUs.

Weights and activations take the narrow dtype, the KV cache too; the stage's other inputs and outputs stay float32. So
do rotary angles (``export.rotary``), softmax (``export.ops``) and the sums of norms (the operators' default).

LinVT's SVR is never narrowed: without residuals its scores lie so close together that 16 bits would choose other
tokens. Which LLMs leave float16's range is a fact of their files (``export.llm``). No vision tower here is known to:
InternViT-300M answers in it (InternLM/lmdeploy issue 2273), so does Qwen2-VL's once its LLM is repaired
(huggingface/transformers pull request 33312), the code that Aquila-VL and Mipha were published with loads SigLIP in it,
and CLIP was published in it. Of Molmo's tuned CLIP nothing is known but that its code, too, has softmax in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from export.stages import Stage
from runtime.errors import CheckpointError

__all__ = ["DTYPES", "narrowed"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CACHES = ("past_", "present_")
MASKS = ("pixel_mask",)  # compared with numbers that a narrow value would be rounded to


def narrowed(stage: Stage, dtype: torch.dtype) -> Stage:
    """The stage in ``dtype``; takes the float32 weights out of its module.

    Raises:
        CheckpointError: a weight lies outside the range of ``dtype``.
    """
    if dtype == torch.float32:
        return stage
    for name, parameter in stage.module.named_parameters():
        check_range(name, parameter.data, stage.name, dtype)
        parameter.data = parameter.data.to(dtype)
    example = tuple(
        value.to(dtype) if name.startswith(CACHES) else value
        for name, value in zip(stage.inputs, stage.example, strict=True)
    )
    cast = [
        value.is_floating_point() and name not in MASKS for name, value in zip(stage.inputs, stage.example, strict=True)
    ]
    kept = [name.startswith(CACHES) for name in stage.outputs]
    module = between_casts(stage.module, dtype, cast, kept)
    return Stage(stage.name, module, example, stage.inputs, stage.outputs, stage.axes, named_inputs=0)


def between_casts(module: nn.Module, dtype: torch.dtype, cast: list[bool], kept: list[bool]) -> nn.Module:
    """The same module, which takes float32 for the inputs to ``cast`` and gives it for the outputs not ``kept``.

    Not one around it: the parameters keep the names that they have in every other dtype.
    """

    class Narrow(type(module)):  # type: ignore[misc]
        """The module between casts."""

        def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
            """The module's inputs and outputs."""
            given = (value.to(dtype) if narrow else value for value, narrow in zip(inputs, cast, strict=True))
            found: Tensor | tuple[Tensor, ...] = super().forward(*given)
            if isinstance(found, Tensor):
                return found.float()
            return tuple(value if narrow else value.float() for value, narrow in zip(found, kept, strict=True))

    module.__class__ = Narrow
    return module


def check_range(name: str, values: Tensor, stage: str, dtype: torch.dtype) -> None:
    """Refuse finite values that become infinite."""
    extremes = torch.stack(values.aminmax())
    lost = extremes.isfinite() & ~extremes.to(dtype).isfinite()
    if lost.any():
        wider = "bfloat16" if dtype == torch.float16 else "float32"
        narrow = str(dtype).removeprefix("torch.")
        raise CheckpointError(
            f"weight {name} of {stage} reaches {extremes[lost][0]:.3g}, which {narrow} cannot hold; use --dtype {wider}"
        )
