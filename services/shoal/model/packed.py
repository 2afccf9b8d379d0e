"""Matrices that lie as Shoal's kernels multiply them (backends/cpu/src/linear.cpp): in panels, read from end to end.

A dot product of bfloat16 adds up pairs of numbers, and a register holds those of sixteen outputs. As files have a
matrix, these are rows apart: they'd have to be gathered for each product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

PANEL = 32
"""Outputs of a panel. The number of inputs must be a multiple of it: a cache line holds as many."""


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """``values`` ``[panels, inputs / 2, 32, 2]``: of panels of outputs, for each pair of inputs, each output's two
    numbers. What the last panel has more than ``num_outputs`` is zeros."""

    values: torch.Tensor
    num_outputs: int

    @classmethod
    def of(cls, weight: torch.Tensor) -> PackedMatrix:
        """``weight`` ``[outputs, inputs]``; inputs are a multiple of 32."""
        outputs, inputs = weight.shape
        padded = F.pad(weight, (0, 0, 0, -outputs % PANEL)) if outputs % PANEL else weight
        return cls(padded.view(-1, PANEL, inputs // 2, 2).transpose(1, 2).contiguous(), outputs)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.num_outputs, 2 * self.values.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """``[len(index), inputs]``: an embedding's, looked up."""
        return self.values[index // PANEL, :, index % PANEL].flatten(1)

    def part(self, outputs: slice) -> PackedMatrix:
        """Those ``outputs`` alone, which are whole panels, or all from one on: a view."""
        first, last = outputs.start, outputs.stop
        return PackedMatrix(self.values[first // PANEL : -(-last // PANEL)], last - first)

    def unpacked(self) -> torch.Tensor:
        """``[outputs, inputs]`` once more, copied."""
        return self.values.transpose(1, 2).reshape(-1, self.shape[1])[: self.num_outputs]

    def linear(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``inputs`` ``[rows, inputs]`` times the matrix transposed, plus ``bias``, by torch: to compare with."""
        return F.linear(inputs, self.unpacked(), bias)


def packed(weight: torch.Tensor, _name: str) -> PackedMatrix | torch.Tensor:
    """As a stage holds it (model/matrix.py); what can't be packed stays as it is."""
    return weight if weight.shape[1] % PANEL else PackedMatrix.of(weight)
