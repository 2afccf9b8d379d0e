"""K/V of the skipped layers, projected from the state that left the last kept layer (POP, section 3).

For a skipped layer ``l`` and ``h = x_K``: ``k_l = RoPE(LN_l(h) W_l^K)``, ``v_l = LN_l(h) W_l^V``. RMSNorm is a
per-token scale times a per-channel weight, so the channel weight folds into the matrix and what is left of the norm is
the same for all layers: ``n(h) = h / sqrt(mean h^2 + eps)``. All skipped layers' K/V are then one GEMM,
``[tokens, hidden] x [hidden, S * 2 * kv_size]``. Where a family has them, the layer's bias and ``k_norm`` come before
its own RoPE, as in the layer itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from shoal.errors import InternalError, MalformedWeights
from shoal.model.families import ModelSpec
from shoal.model.matrix import Hold, Weight, linear
from shoal.model.norm import rms_norm
from shoal.model.packed import PANEL, PackedMatrix, packed
from shoal.model.rope import Rope

Multiply = Callable[[torch.Tensor, Weight, torch.Tensor | None], torch.Tensor]
"""As ``linear`` of model/matrix.py."""


@dataclass(frozen=True, slots=True)
class LayerProjection:
    """One skipped layer's own parameters: input norm ``[hidden]``, ``k_proj|v_proj`` ``[2 * kv_size, hidden]``, their
    bias ``[2 * kv_size]`` or ``None``, ``k_norm`` ``[head_dim]`` or ``None``, and the number of its RoPE table."""

    norm: torch.Tensor
    kv: torch.Tensor
    bias: torch.Tensor | None
    k_norm: torch.Tensor | None = None
    rope: int = 0


class KvProjection:
    """The projection of all skipped layers as one matrix ``[S * 2 * kv_size, hidden]``."""

    def __init__(self, spec: ModelSpec, layers: Sequence[LayerProjection]) -> None:
        self._spec = spec
        self.num_layers = len(layers)
        # Folded in float32 at least: rounding the product once is better than rounding both factors.
        wide = [layer.kv.to(_wide(layer.kv.dtype)) * layer.norm.to(_wide(layer.kv.dtype)) for layer in layers]
        self.matrix: Weight = torch.cat(wide).to(layers[0].kv.dtype)
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        k_norms = [layer.k_norm for layer in layers if layer.k_norm is not None]
        self.k_norm = torch.stack(k_norms)[:, None] if k_norms else None  # [S, 1, head_dim]
        self.ropes = [layer.rope for layer in layers]
        self.num_sinks = 0
        self.sink_weight: torch.Tensor | None = None

    def replaced(self, weight: torch.Tensor, num_sinks: int = 0) -> KvProjection:
        """The same with another matrix ``[S * 2 * kv_size, hidden]``: a calibrated one (model/projector.py).

        The first ``num_sinks`` positions keep this one. Deep layers rest their attention there (arXiv 2309.17453); the
        states are unlike all others, and what is learnt from those is wrong for these. Raises MalformedWeights if it
        has another shape.
        """
        if weight.shape != self.weight.shape:
            shape, wanted = tuple(weight.shape), tuple(self.weight.shape)
            raise MalformedWeights(f"the projector has shape {shape}, this plan wants {wanted}: calibrate again")
        other = self._with(weight)
        other.num_sinks, other.sink_weight = num_sinks, self.weight if num_sinks else None
        return other

    def held(self, hold: Hold) -> KvProjection:
        """As a step multiplies it, if those are the same numbers: in int8 shallow tokens would get other K/V from
        decode than from prefill."""
        if hold is not packed or not isinstance(self.matrix, torch.Tensor):
            return self
        return self._with(packed(self.matrix, "projection"))

    def unpacked(self) -> KvProjection:
        """As torch multiplies it."""
        return self._with(self.matrix.unpacked()) if isinstance(self.matrix, PackedMatrix) else self

    @property
    def can_be_cut(self) -> bool:
        """A layer's outputs end where a panel does."""
        return not isinstance(self.matrix, PackedMatrix) or 2 * self._spec.kv_size % PANEL == 0

    def part(self, first: int, last: int) -> KvProjection:
        """The projection of some of the skipped layers, ``[first, last)`` of them: views of the same matrices, if it
        ``can_be_cut``."""
        size, whole = 2 * self._spec.kv_size, self.matrix
        outputs = slice(first * size, last * size)
        other = self._with(whole.part(outputs) if isinstance(whole, PackedMatrix) else self.weight[outputs])
        other.num_layers, other.ropes = last - first, self.ropes[first:last]
        other.bias = None if self.bias is None else self.bias[outputs]
        other.k_norm = None if self.k_norm is None else self.k_norm[first:last]
        other.sink_weight = None if self.sink_weight is None else self.sink_weight[outputs]
        return other

    @property
    def weight(self) -> torch.Tensor:
        """The matrix, where it's as it was made. Raises InternalError."""
        if not isinstance(self.matrix, torch.Tensor):
            raise InternalError("this projection is held as a step multiplies it: take it as it was made")
        return self.matrix

    def _with(self, matrix: Weight) -> KvProjection:
        other = copy.copy(self)
        other.matrix = matrix
        return other

    def of_sinks(self, normed: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Of ``normed`` ``[tokens, hidden]`` the rows that are sinks, and what their own matrix makes of them,
        ``[rows, S * 2 * kv_size]``; ``None`` if there are none."""
        if self.sink_weight is None:
            return None
        rows = (rope.positions < self.num_sinks).nonzero().squeeze(1)
        return (rows, linear(normed[rows], self.sink_weight, self.bias)) if rows.numel() else None

    def __call__(self, hidden: torch.Tensor, rope: Rope, multiply: Multiply = linear) -> torch.Tensor:
        """``hidden`` ``[tokens, hidden]`` -> K/V ``[S, tokens, 2, kv_heads, head_dim]`` (a strided view)."""
        spec = self._spec
        normed = rms_norm(hidden, None, spec.norm_eps)
        flat = multiply(normed, self.matrix, self.bias)
        if sinks := self.of_sinks(normed, rope):
            flat = flat.index_copy(0, sinks[0], sinks[1].to(flat.dtype))
        kv = flat.view(hidden.shape[0], self.num_layers, 2, spec.num_kv_heads, spec.head_dim)
        if self.k_norm is not None:
            # A new tensor, for a gradient needs what was normed.
            kv = torch.stack([rms_norm(kv[:, :, 0], self.k_norm, spec.norm_eps), kv[:, :, 1]], dim=2)
        for layers, table in _runs(self.ropes):
            rope.rotate_(kv[:, layers, 0], table)
        return kv.transpose(0, 1)


def _runs(tables: Sequence[int]) -> list[tuple[slice, int]]:
    """Neighbouring layers that share a RoPE table are rotated at once."""
    runs, first = [], 0
    for table, members in groupby(tables):
        last = first + len(list(members))
        runs.append((slice(first, last), table))
        first = last
    return runs


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
