"""The slow obvious form of Molmo-7B-O's LLM, which no recording covers: the oracle of ours."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = "model.transformer.blocks."
HEAD = "model.transformer.ff_out.weight"


def slow_7b_o(tensors: dict[str, Tensor], states: Tensor, *, heads: int, theta: float, eps: float) -> Tensor:
    """OLMo-1024's formula, token by token and head by head: (S, D) -> (S, V)."""

    def norm(row: Tensor, name: str) -> Tensor:
        return row / (row.square().mean() + eps).sqrt() * tensors[name].double()

    def turned(head: Tensor, position: int) -> Tensor:
        half = len(head) // 2
        angle = position * theta ** (-torch.arange(half).double() / half)
        pairs = torch.complex(head[:half], head[half:]) * torch.polar(torch.ones(half).double(), angle)
        return torch.cat((pairs.real, pairs.imag))

    rows = list(states.double())
    for layer in range(2):
        part = {name.removeprefix(f"{BLOCK}{layer}."): value.double() for name, value in tensors.items()}
        width, kv = len(rows[0]), len(part["k_norm.weight"])
        size, keys, values, after = width // heads, [], [], []
        for position, row in enumerate(rows):
            query, key, value = (part["att_proj.weight"] @ row).split((width, kv, kv))
            query, key = norm(query, f"{BLOCK}{layer}.q_norm.weight"), norm(key, f"{BLOCK}{layer}.k_norm.weight")
            keys.append([turned(head, position) for head in key.split(size)])
            values.append(value.split(size))
            attended = []
            for index, head in enumerate(query.split(size)):
                group = index * (kv // size) // heads
                scores = torch.stack([turned(head, position) @ past[group] for past in keys]) / size**0.5
                attended.append(torch.stack([past[group] for past in values]).T @ scores.softmax(0))
            row = row + norm(part["attn_out.weight"] @ torch.cat(attended), f"{BLOCK}{layer}.attn_norm.weight")
            up, gate = (part["ff_proj.weight"] @ row).chunk(2)
            mixed = part["ff_out.weight"] @ (gate * gate.sigmoid() * up)
            after.append(row + norm(mixed, f"{BLOCK}{layer}.ff_norm.weight"))
        rows = after
    return torch.stack([tensors[HEAD].double() @ norm(row, "model.transformer.ln_f.weight") for row in rows])
