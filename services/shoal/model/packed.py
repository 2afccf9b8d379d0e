"""Matrices that lie as Shoal's kernels multiply them (kernels/src/linear.cpp): in panels, read from end to end.

A dot product of bfloat16 adds up pairs of numbers, and a register holds those of sixteen outputs. As files have a
matrix, these are rows apart: they'd have to be gathered for each product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

PANEL = 32
"""Outputs of a panel. The number of inputs must be a multiple of it, too: a cache line holds as many."""


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """``values`` ``[outputs / 32, inputs / 2, 32, 2]``: of panels of outputs, for each pair of inputs, each output's
    two numbers."""

    values: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> PackedMatrix:
        """``weight`` ``[outputs, inputs]``, both multiples of 32."""
        outputs, inputs = weight.shape
        panels = weight.view(outputs // PANEL, PANEL, inputs // 2, 2)
        return cls(panels.transpose(1, 2).contiguous())

    @property
    def shape(self) -> torch.Size:
        panels, pairs, outputs, _ = self.values.shape
        return torch.Size((panels * outputs, pairs * 2))

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """``[len(index), inputs]``: an embedding's, looked up."""
        return self.values[index // PANEL, :, index % PANEL].flatten(1)

    def unpacked(self) -> torch.Tensor:
        """``[outputs, inputs]`` once more, copied."""
        return self.values.transpose(1, 2).reshape(self.shape)

    def linear(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``inputs`` ``[rows, inputs]`` times the matrix transposed, plus ``bias``, by torch: to compare with."""
        return F.linear(inputs, self.unpacked(), bias)


def packed(weight: torch.Tensor, _name: str) -> PackedMatrix | torch.Tensor:
    """As a stage holds it (model/matrix.py); what can't be packed stays as it is."""
    return weight if any(size % PANEL for size in weight.shape) else PackedMatrix.of(weight)
