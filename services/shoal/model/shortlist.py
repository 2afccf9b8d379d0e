"""Where a head's largest output can be, read off half of its bytes.

::

    w  a row of the head, q  the same in int8, x  the inputs
    |w x - q x|  <=  |w - q| |x|                                          (Cauchy and Schwarz)

So with ``bounds`` b = |w - q|, and what rounding adds, an output of ``q`` that is below another one by more than both
of their ``b |x|`` can't be the largest of ``w``'s. Those that can are made anew, of ``w`` (src/shortlist.cpp):
the largest is then the very number that it would have been, and a greedy answer goes on by the same token. A step of
few rows takes as long as reading does, and a small model's head is a fifth of what is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from shoal.errors import MalformedWeights
from shoal.model.int8 import pieces, rounded_rows
from shoal.model.packed import PackedMatrix

# Inputs become whole numbers of steps, a step being 1/32639 of the row's largest, which is at most its length: each is
# off by half a step, and a bit more, since the step is itself rounded.
_INPUT_STEP = 0.51 / 32639
# A sum of n products in float32, in whatever order, is off by n 2**-24 of their sizes; of int8 it's exact, and rounded
# a few times. Four times that.
_SUM_STEP = 2.0**-22
# Numbers below this may be taken for nothing: by processors, and by lengths, since their squares are.
_NOTHING = 2.0**-60
# Lengths and bounds are themselves rounded, and what bfloat16 rounds off an output is of the bound, too.
_SPARE = 1.01


@dataclass(frozen=True, slots=True)
class Shortlist:
    """``values`` int8 ``[outputs, inputs]`` times ``scales`` float32 ``[outputs]`` is the ``head`` rounded, ``bounds``
    float32 ``[outputs]``: how far an output's two products can be apart, for inputs of length 1."""

    head: PackedMatrix
    values: torch.Tensor
    scales: torch.Tensor
    bounds: torch.Tensor

    @classmethod
    def of(cls, head: PackedMatrix) -> Shortlist | None:
        """``None`` where the head holds numbers that aren't finite: whoever meets them is to see them."""
        outputs, size = head.shape
        values = torch.empty(outputs, size, dtype=torch.int8)
        scales, bounds = torch.empty(2, outputs, dtype=torch.float32)
        rounding, negligible = math.sqrt(size) * _INPUT_STEP + size * _SUM_STEP, math.sqrt(size) * _NOTHING
        for piece in pieces(outputs, size):
            weight = head.part(piece).unpacked()
            try:
                values[piece], scales[piece] = rounded_rows(weight, "lm_head")
            except MalformedWeights:
                return None
            # In float32: of numbers whose products could be infinite a length is, and then nothing is ruled out.
            whole = weight.float()
            lost = (whole - values[piece] * scales[piece, None]).norm(dim=1)
            bounds[piece] = (lost + rounding * (whole.norm(dim=1) + lost) + negligible) * _SPARE
        return cls(head, values, scales, bounds)

    @property
    def num_bytes(self) -> int:
        """Beside the head's own."""
        return self.values.nbytes + self.scales.nbytes + self.bounds.nbytes
