"""Rotary position embedding (arXiv 2104.09864) for the rows of one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shoal.model.families import ModelSpec


@dataclass(frozen=True, slots=True)
class Rope:
    """Cosines and sines ``[tokens, head_dim / 2]`` of the rows' positions, in the activations' dtype."""

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def at(cls, spec: ModelSpec, positions: torch.Tensor, dtype: torch.dtype) -> Rope:
        """Angles are taken in float32, as the models were trained, whatever ``dtype`` is."""
        inv_freq = torch.tensor(spec.inv_freq, dtype=torch.float32, device=positions.device)
        angles = positions.to(torch.float32)[:, None] * inv_freq
        return cls((angles.cos() * spec.rope_scale).to(dtype), (angles.sin() * spec.rope_scale).to(dtype))

    def rows(self, index: torch.Tensor | None) -> Rope:
        """The same for some of the rows (``None``: all)."""
        return self if index is None else Rope(self.cos[index], self.sin[index])

    def rotate_(self, x: torch.Tensor) -> None:
        """Rotate ``x`` ``[tokens, ..., head_dim]`` in place: halves ``(a, b) -> (a cos - b sin, b cos + a sin)``."""
        shape = (x.shape[0],) + (1,) * (x.dim() - 2) + (-1,)
        cos, sin = self.cos.view(shape), self.sin.view(shape)
        half = x.shape[-1] // 2
        first, second = x[..., :half], x[..., half:]
        rotated = first * cos - second * sin
        second.mul_(cos).add_(first * sin)
        first.copy_(rotated)
