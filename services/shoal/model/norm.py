"""RMSNorm (arXiv 1910.07467)."""

from __future__ import annotations

import torch


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``hidden / sqrt(mean(hidden²) + eps) * weight`` over the last axis, in ``hidden``'s dtype.

    The mean is taken in float32 at least. Only one number a row is kept that wide: torch's own norm widens the whole
    matrix first, which on a CPU takes several times as long as the arithmetic. A ``weight`` wider than ``hidden``
    asks for just that, and one rounding at the end (Gemma).
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=wide)
    scale = torch.rsqrt(length.square() / hidden.shape[-1] + eps)
    if weight is not None and weight.dtype != hidden.dtype:
        return (hidden * scale).mul_(weight).to(hidden.dtype)
    scaled = hidden * scale.to(hidden.dtype)
    return scaled if weight is None else scaled.mul_(weight)
