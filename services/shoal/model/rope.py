"""Rotary position embedding (arXiv 2104.09864) for the rows of one step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from shoal.model.families import ModelSpec, RopeTable

_LEAST_POSITIONS, _MOST_POSITIONS = 1 << 11, 1 << 16
_tables: dict[tuple[RopeTable, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}
"""On the CPU; one that is too short is replaced as a whole."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Of each of the model's RoPE tables the cosines and sines ``[tokens, head_dim / 2]`` of the rows' ``positions``
    ``[tokens]``, in the activations' dtype."""

    positions: torch.Tensor
    cos: tuple[torch.Tensor, ...]
    sin: tuple[torch.Tensor, ...]

    @classmethod
    def at(cls, spec: ModelSpec, positions: torch.Tensor, dtype: torch.dtype) -> Rope:
        """Angles are taken in float32, as the models were trained, whatever ``dtype`` is."""
        find = _remembered if positions.device.type == "cpu" and len(positions) else _computed
        cos, sin = zip(*(find(table, positions, dtype) for table in spec.rope_tables), strict=True)
        return cls(positions, cos, sin)

    def rows(self, index: torch.Tensor | slice | None) -> Rope:
        """The same for some of the rows (``None``: all)."""
        if index is None:
            return self
        return Rope(self.positions[index], tuple(cos[index] for cos in self.cos), tuple(sin[index] for sin in self.sin))

    def rotate_(self, x: torch.Tensor, table: int = 0) -> None:
        """Rotate ``x`` ``[tokens, ..., head_dim]`` in place: halves ``(a, b) -> (a cos - b sin, b cos + a sin)``."""
        shape = (x.shape[0],) + (1,) * (x.dim() - 2) + (-1,)
        cos, sin = self.cos[table].view(shape), self.sin[table].view(shape)
        half = x.shape[-1] // 2
        first, second = x[..., :half], x[..., half:]
        rotated = first * cos - second * sin
        second.mul_(cos).add_(first * sin)
        first.copy_(rotated)


def _computed(table: RopeTable, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    angles = positions.to(torch.float32)[:, None] * _inv_freq(table, positions.device)
    return (angles.cos() * table.scale).to(dtype), (angles.sin() * table.scale).to(dtype)


def _remembered(table: RopeTable, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from what was computed for all positions up to a power of two, if that isn't too much to keep.

    A prompt's take torch as long as some kernels take, and of eight rows and more they are a parallel region, whose
    threads a step that only decodes has to wake.
    """
    known = all_angles(table, int(positions.max()), dtype)
    if known is None:
        return _computed(table, positions, dtype)
    cos, sin = known
    return cos.index_select(0, positions), sin.index_select(0, positions)


def all_angles(table: RopeTable, last: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Cosines and sines of all positions up to ``last`` at least, on the CPU; ``None``: too much to keep."""
    if last >= _MOST_POSITIONS:
        return None
    known = _tables.get((table, dtype))
    if known is None or len(known[0]) <= last:
        with torch.inference_mode(False):
            all_positions = torch.arange(max(_LEAST_POSITIONS, 1 << last.bit_length()))
            known = _tables[table, dtype] = _computed(table, all_positions, dtype)
    return known


@cache
def _inv_freq(table: RopeTable, device: torch.device) -> torch.Tensor:
    """``[head_dim / 2]``, float32; not to be written to, and no inference tensor, whoever asks first.

    Kept for good: to copy it to a GPU would stop each step, and those recorded (step_graph.py) read this one.
    """
    with torch.inference_mode(False):
        return torch.tensor(table.inv_freq, dtype=torch.float32, device=device)
