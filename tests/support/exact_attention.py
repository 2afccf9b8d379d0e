"""What attention is, in float64: what kernels and operators are held against."""

from __future__ import annotations

import math

import torch


def exact_attention(
    queries: torch.Tensor, kv: torch.Tensor, seen: torch.Tensor, scale: float, softcap: float | None = None
) -> torch.Tensor:
    """``queries`` ``[rows, heads, head_dim]`` over ``kv`` ``[context, 2, kv_heads, head_dim]``, of which rows may look
    where ``seen`` ``[rows, context]`` says so."""
    shared = queries.shape[1] // kv.shape[2]
    keys, values = (kv[:, part].double().repeat_interleave(shared, dim=1) for part in (0, 1))
    scores = torch.einsum("rhd,chd->hrc", queries.double(), keys) * scale
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    return torch.einsum("hrc,chd->rhd", scores.masked_fill(~seen, -math.inf).softmax(-1), values)
