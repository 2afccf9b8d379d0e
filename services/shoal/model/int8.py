"""Matrices in int8, and what they multiply as well: half the bytes of bfloat16, and half of its multiplications.

Weights are rounded once, symmetric, by one scale an output (a row here): ``weight[o, i] = scales[o] * values[o, i]``.
Inputs are rounded as they come, by one scale for each ``BLOCK`` of a row's: of a row, few numbers are far larger than
all others, and with one scale for all of it, those others would be lost. Sums of a block's products are whole numbers,
and exact (backends/cpu/src/bytes.hpp); blocks are added up in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from shoal.errors import MalformedWeights
from shoal.model.packed import PANEL

LARGEST = 127
BLOCK = 64
"""Inputs that share a scale."""
_FOUR = 4  # inputs whose products are added at once
_SIGN = 128  # what is added to weights, of which the multiplier wants no sign
# What is smaller than this in all of a block becomes nothing: the inverse of a scale must be finite.
_NOTHING = 1e-30
# What exists at once in another dtype, of a matrix that is made or multiplied.
_MAX_WIDE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Int8Matrix:
    """``values`` uint8 ``[panels, inputs / 4, 32, 4]``: of panels of outputs, for each four inputs, each output's four
    numbers, 128 added; ``scales`` float32 ``[panels * 32]``. Inputs are filled up to whole blocks, outputs to whole
    panels. Stands for a matrix ``[num_outputs, num_inputs]`` of ``dtype``."""

    values: torch.Tensor
    scales: torch.Tensor
    num_outputs: int
    num_inputs: int
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: torch.Tensor, name: str) -> Int8Matrix:
        """``weight`` ``[outputs, inputs]``, rounded and packed a piece at a time. Raises MalformedWeights that says
        ``name`` where a number isn't finite."""
        outputs, inputs = weight.shape
        panels, padding = -(-outputs // PANEL), -inputs % BLOCK
        values = torch.empty(panels, (inputs + padding) // _FOUR, PANEL, _FOUR, dtype=torch.uint8, device=weight.device)
        scales = weight.new_zeros(panels * PANEL, dtype=torch.float32)
        for piece in pieces(outputs, inputs):
            made, scales[piece] = rounded_rows(weight[piece], name)
            filled = F.pad(made, (0, padding, 0, -len(made) % PANEL)).to(torch.int16) + _SIGN
            rows = filled.to(torch.uint8).view(-1, PANEL, values.shape[1], _FOUR)
            values[piece.start // PANEL : piece.start // PANEL + len(rows)] = rows.transpose(1, 2)
        return cls(values, scales, outputs, inputs, weight.dtype)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.num_outputs, self.num_inputs))

    @property
    def device(self) -> torch.device:
        return self.values.device

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """``[len(index), inputs]`` of ``dtype``: an embedding's, looked up."""
        wide = torch.promote_types(self.dtype, torch.float32)
        values = self.values[index // PANEL, :, index % PANEL].flatten(1)[:, : self.num_inputs].to(wide) - _SIGN
        return (values * self.scales[index, None]).to(self.dtype)

    def linear(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``inputs`` ``[rows, inputs]``, rounded, times the matrix transposed, plus ``bias``, by torch, to compare
        with. At no time is more than 8 MiB of the matrix in the dtype in which it's multiplied: float32, or float64."""
        wide = rounded_inputs(inputs)
        out = wide.new_empty(wide.shape[0], self.num_outputs)
        for piece in pieces(self.num_outputs, self.num_inputs, wide.element_size()):
            panels = self.values[piece.start // PANEL : -(-piece.stop // PANEL)]
            values = panels.transpose(1, 2).flatten(2).flatten(0, 1)[: piece.stop - piece.start, : self.num_inputs]
            out[:, piece] = F.linear(wide, values.to(wide.dtype).sub_(_SIGN))
        out.mul_(self.scales[: self.num_outputs])
        return (out if bias is None else out.add_(bias)).to(inputs.dtype)


def rounded_rows(weight: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``(values, scales)`` of ``weight`` ``[outputs, inputs]``: int8, of the same shape, each row rounded to 255 even
    steps over its largest number, and float32 ``[outputs]``. Raises MalformedWeights as ``Int8Matrix.of`` does."""
    wide = weight.to(torch.float32)
    largest = wide.abs().amax(dim=1)
    if not bool(largest.isfinite().all()):
        raise MalformedWeights(f"{name} holds numbers that aren't finite, and int8 can't: is the file damaged?")
    scales = largest / LARGEST
    steps = wide / scales.where(scales > 0, 1.0)[:, None]
    return steps.round_().clamp_(-LARGEST, LARGEST).to(torch.int8), scales


def rounded_inputs(inputs: torch.Tensor) -> torch.Tensor:
    """``inputs`` ``[rows, inputs]`` as they are multiplied, in float32, or in float64 as they were."""
    wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    blocks = F.pad(wide, (0, -wide.shape[1] % BLOCK)).view(len(wide), -1, BLOCK)
    largest = blocks.abs().amax(dim=2, keepdim=True)
    is_something = ~(largest < _NOTHING)
    # A number by a tensor would be its inverse, times the number: rounded twice, which no kernel does.
    factor = torch.full_like(largest, LARGEST).div_(largest).where(is_something, 0.0)
    scales = (largest / LARGEST).where(is_something, 0.0)
    return ((blocks * factor).round_() * scales).flatten(1)[:, : inputs.shape[1]]


def pieces(outputs: int, inputs: int, wide_bytes: int = 4) -> Iterator[slice]:
    """Whole panels of rows, few enough to be had in another dtype, of so many bytes a number, as well."""
    num_rows = max(1, _MAX_WIDE_BYTES // (wide_bytes * inputs * PANEL)) * PANEL
    return (slice(start, min(start + num_rows, outputs)) for start in range(0, outputs, num_rows))
