"""LinVT, the Linear Video Tokenizer of arXiv 2412.05185, in PyTorch: the reference for everything exported.

The state dict of ``LinVT`` has the tensor names of the released checkpoints (``query_tokens``, ``linVT.*``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from export.linvt.svr import SVR, Selection
from export.linvt.tta import TTA
from runtime.linvt import LinVTConfig, paper, released

__all__ = ["SVR", "TTA", "LinVT", "LinVTConfig", "Selection", "paper", "released"]


class LinVT(nn.Module):
    """All frames of a clip and a question in, Q tokens for the LLM out."""

    def __init__(self, config: LinVTConfig) -> None:
        super().__init__()
        self.config = config
        self.query_tokens = nn.Parameter(torch.randn(1, config.queries, config.width) * 0.02)
        self.linVT = nn.Module()
        self.linVT.svt_module = SVR(config)
        self.linVT.tta_module = TTA(config)

    @property
    def svr(self) -> SVR:
        """The part that looks at the video alone."""
        module = self.linVT.svt_module
        assert isinstance(module, SVR)
        return module

    @property
    def tta(self) -> TTA:
        """The part that looks at the question too."""
        module = self.linVT.tta_module
        assert isinstance(module, TTA)
        return module

    def forward(self, visual: Tensor, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Frame tokens (B, T, N, D) and question rows (B, S, D) -> (B, Q, D).

        ``text_mask`` (B, 1, 1, S) bool is False on padded question rows.
        """
        return self.aggregate(self.svr(visual).visual, text, text_mask)

    def aggregate(self, visual: Tensor, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Pooled tokens (B, M, D) and question rows (B, S, D) -> (B, Q, D)."""
        queries = self.query_tokens.expand(visual.shape[0], -1, -1)
        aggregated: Tensor = self.tta(queries, visual, text, text_mask)
        return aggregated
