"""A matrix that is multiplied, in whichever form a stage holds it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from shoal.model.int8 import Int8Matrix
from shoal.model.packed import PackedMatrix
from shoal.process.machine import is_intels

Weight = torch.Tensor | Int8Matrix | PackedMatrix

# From a matrix as it was read, and its name for an error, to how a stage holds it. Raises MalformedWeights.
Hold = Callable[[torch.Tensor, str], Weight]


def rows_of(table: Weight, index: torch.Tensor) -> torch.Tensor:
    """``[len(index), inputs]``: an embedding's, looked up."""
    return F.embedding(index, table) if isinstance(table, torch.Tensor) else table.rows(index)


def linear(inputs: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """``inputs`` ``[rows, inputs]`` times ``weight`` ``[outputs, inputs]`` transposed, plus ``bias``, by torch."""
    if not isinstance(weight, torch.Tensor):
        return weight.linear(inputs, bias)
    if weight.dtype is torch.float32 and weight.device.type == "cpu" and not _is_trained(inputs, weight, bias):
        by_onednn = onednn_linear()
        if by_onednn is not None and not _is_mkl_quicker(inputs.shape[0]):
            return by_onednn(inputs, weight, bias)
    return F.linear(inputs, weight, bias)


def _is_mkl_quicker(num_rows: int) -> bool:
    """On Intel's processors (Ice Lake; others weren't measured) it is with one row or two, and with many; in between
    it takes up to three times as long."""
    return is_intels() and not 2 < num_rows <= 64


def _is_trained(*tensors: torch.Tensor | None) -> bool:
    """oneDNN's operation has no gradient."""
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


@cache
def onednn_linear() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor] | None:
    """oneDNN's product of float32, where this torch has it and would ask MKL.

    On AMD's processors (Zen 4) MKL reads a large matrix at half the speed, for some rows at a third. Where torch has no
    MKL, as on ARM, it chooses by itself. There is no public name for the operation; torch.compile takes it, too.
    """
    has_both = all(library.is_available() for library in (torch.backends.mkl, torch.backends.mkldnn))
    if not has_both or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    product: Any = torch.ops.mkldnn._linear_pointwise.default
    return lambda inputs, weight, bias: product(inputs, weight, bias, "none", [], "")
