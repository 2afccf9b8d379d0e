"""Matrices in int8: half the bytes of bfloat16, and a decode step of few streams spends its time on reading them.

Symmetric, one scale an output (a row here): ``weight[o, i] = scales[o] * values[o, i]``. A scale for all of a row, and
not one for each group of its inputs, lets a product run over whole numbers from end to end, exactly (kernels/src/
int8_linear.cpp), and lets torch multiply the values as they are, since bfloat16 holds -127..127 exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from shoal.errors import MalformedWeights
from shoal.machine import multiplies_bfloat16

LARGEST = 127
# What exists at once in another dtype, of a matrix that is made or multiplied.
_MAX_WIDE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Int8Matrix:
    """``values`` int8 ``[outputs, inputs]``, ``scales`` float32 ``[outputs]``; stands for a matrix of ``dtype``."""

    values: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: torch.Tensor, name: str) -> Int8Matrix:
        """``weight`` ``[outputs, inputs]``, each row rounded to 255 even steps over its largest number, a piece at a
        time. Raises MalformedWeights that says ``name`` where a number isn't finite."""
        values = torch.empty_like(weight, dtype=torch.int8)
        scales = weight.new_empty(weight.shape[0], dtype=torch.float32)
        for piece in _pieces(weight):
            wide = weight[piece].to(torch.float32)
            largest = wide.abs().amax(dim=1)
            if not bool(largest.isfinite().all()):
                raise MalformedWeights(f"{name} holds numbers that aren't finite, and int8 can't: is the file damaged?")
            scale = largest / LARGEST
            scales[piece] = scale
            steps = wide / scale.where(scale > 0, 1.0)[:, None]
            values[piece] = steps.round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
        return cls(values, scales, weight.dtype)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """``[len(index), inputs]`` of ``dtype``: an embedding's, looked up."""
        wide = torch.promote_types(self.dtype, torch.float32)
        return (self.values[index].to(wide) * self.scales[index, None]).to(self.dtype)

    def dequantized(self) -> torch.Tensor:
        """The whole matrix in ``dtype``, as its products have it but for rounding."""
        return self.rows(torch.arange(self.shape[0], device=self.device))

    def linear(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``inputs`` ``[rows, inputs]`` times the matrix transposed, plus ``bias``, by torch: for many rows. At no time
        is more than 8 MiB of the matrix in the dtype in which it's multiplied."""
        wide = inputs.to(_multiplied_as(inputs))
        pieces = list(_pieces(self.values, wide.element_size()))
        if len(pieces) == 1:
            out = F.linear(wide, self.values.to(wide.dtype))
        else:
            out = wide.new_empty(wide.shape[0], self.shape[0])
            for piece in pieces:
                out[:, piece] = F.linear(wide, self.values[piece].to(wide.dtype))
        out.mul_(self.scales)
        return (out if bias is None else out.add_(bias)).to(inputs.dtype)


def _multiplied_as(inputs: torch.Tensor) -> torch.dtype:
    is_emulated = inputs.dtype is torch.bfloat16 and inputs.device.type == "cpu" and not multiplies_bfloat16()
    return torch.float32 if is_emulated else inputs.dtype


def _pieces(matrix: torch.Tensor, wide_bytes: int = 4) -> Iterator[slice]:
    """Whole rows, few enough to be had in another dtype, of so many bytes a number, as well."""
    num_rows = max(1, _MAX_WIDE_BYTES // (wide_bytes * matrix.shape[1]))
    return (slice(start, start + num_rows) for start in range(0, matrix.shape[0], num_rows))
