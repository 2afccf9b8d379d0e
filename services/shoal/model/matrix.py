"""A matrix that is multiplied, in whichever form a stage holds it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from shoal.model.int8 import Int8Matrix
from shoal.model.packed import PackedMatrix

Weight = torch.Tensor | Int8Matrix | PackedMatrix

# From a matrix as it was read, and its name for an error, to how a stage holds it. Raises MalformedWeights.
Hold = Callable[[torch.Tensor, str], Weight]


def rows_of(table: Weight, index: torch.Tensor) -> torch.Tensor:
    """``[len(index), inputs]``: an embedding's, looked up."""
    return F.embedding(index, table) if isinstance(table, torch.Tensor) else table.rows(index)


def linear(inputs: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """``inputs`` ``[rows, inputs]`` times ``weight`` ``[outputs, inputs]`` transposed, plus ``bias``, by torch."""
    return F.linear(inputs, weight, bias) if isinstance(weight, torch.Tensor) else weight.linear(inputs, bias)
