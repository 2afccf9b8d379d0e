"""Where a head's largest output can be, read off half of its bytes.

::

    w  a row of the head, q  the same in int8 (model/int8.py), x  the inputs
    |w x - q x|  <=  |w - q| |x|                                          (Cauchy and Schwarz)

So with ``bounds`` b = |w - q|, and what rounding adds, an output of ``q`` that is below another one by more than both
of their ``b |x|`` can't be the largest of ``w``'s. Those that can are made anew, of ``w`` (kernels/src/shortlist.cpp):
the largest is then the very number that it would have been, and a greedy answer goes on by the same token. A step of
few rows takes as long as reading does, and a small model's head is a fifth of what is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from shoal.errors import MalformedWeights
from shoal.model.int8 import Int8Matrix
from shoal.model.packed import PackedMatrix

# A number of 16 bits is off by half a step, 1/32639 of a row's largest, which is at most its length; by a bit more, as
# the step is itself rounded.
_INPUT_STEP = 0.51 / 32639
# A sum of n products in float32, in whatever order, is off by n 2**-24 of their sizes; here it's two sums.
_SUM_STEP = 2.0**-21
# The bounds themselves are rounded, and so is what they are multiplied by and added to.
_SPARE = 1.01
_ROWS_AT_ONCE = 2048


@dataclass(frozen=True, slots=True)
class Shortlist:
    """``matrix`` is the ``head`` in int8, ``bounds`` float32 ``[outputs]``: how far an output's two products can be
    apart, for inputs of length 1."""

    head: PackedMatrix
    matrix: Int8Matrix
    bounds: torch.Tensor

    @classmethod
    def of(cls, head: PackedMatrix) -> Shortlist | None:
        """``None`` where the head holds numbers that aren't finite: whoever meets them is to see them."""
        weight = head.unpacked()
        try:
            matrix = Int8Matrix.of(weight, "lm_head")
        except MalformedWeights:
            return None
        size = weight.shape[1]
        rounding = math.sqrt(size) * _INPUT_STEP + size * _SUM_STEP
        bounds = torch.empty_like(matrix.scales)
        for start in range(0, weight.shape[0], _ROWS_AT_ONCE):
            piece = slice(start, start + _ROWS_AT_ONCE)
            wide = weight[piece].float()
            rest = wide - matrix.values[piece] * matrix.scales[piece, None]
            bounds[piece] = (rest.norm(dim=1) + rounding * wide.norm(dim=1)) * _SPARE
        return cls(head, matrix, bounds)
