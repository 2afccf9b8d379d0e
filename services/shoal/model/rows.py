"""What a layer does to each row by itself."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from shoal.model.families import Activation, ModelSpec
from shoal.model.kv_pool import KvPool
from shoal.model.matrix import Weight, linear, rows_of
from shoal.model.norm import rms_norm
from shoal.model.projection import KvProjection
from shoal.model.rope import Rope


class RowOps(Protocol):
    """``hidden`` and the like are ``[rows, hidden]``; nothing given is changed but the heads."""

    def embed(self, table: Weight, index: torch.Tensor) -> torch.Tensor:
        """``[len(index), hidden]``: rows of an embedding."""

    def norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMS norm."""

    def add(self, hidden: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        """``hidden + added``."""

    def add_norm(
        self, hidden: torch.Tensor, added: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``hidden + added``, and its RMS norm."""

    def rotate_and_store(
        self, heads: torch.Tensor, rope: Rope, table: int, pool: KvPool, layer: int, slots: torch.Tensor
    ) -> torch.Tensor:
        """Rotate queries and keys of ``heads`` ``[rows, heads + 2 kv_heads, head_dim]``, put K/V into the pool at
        ``slots``; the queries ``[rows, heads, head_dim]``."""

    def gated(self, inputs: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
        """``activation(gate) * up`` of what ``linear`` makes, ``gate|up``."""

    def linear(self, inputs: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``inputs`` times ``weight`` ``[outputs, inputs]`` transposed, plus ``bias``."""

    def project(self, projection: KvProjection, hidden: torch.Tensor, rope: Rope) -> torch.Tensor:
        """K/V of the skipped layers ``[S, rows, 2, kv_heads, head_dim]``."""

    def project_and_store(
        self, projection: KvProjection, hidden: torch.Tensor, rope: Rope, pool: KvPool, first: int, slots: torch.Tensor
    ) -> None:
        """Put what ``project`` makes into the pool's layers from ``first`` on, at ``slots``."""


class TorchRows:
    """By torch, on any device and in any dtype; can be differentiated."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec

    def embed(self, table: Weight, index: torch.Tensor) -> torch.Tensor:
        return rows_of(table, index)

    def norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden, weight, self._spec.norm_eps)

    def add(self, hidden: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        return hidden + added

    def add_norm(
        self, hidden: torch.Tensor, added: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.add(hidden, added)
        return hidden, self.norm(hidden, weight)

    def rotate_and_store(
        self, heads: torch.Tensor, rope: Rope, table: int, pool: KvPool, layer: int, slots: torch.Tensor
    ) -> torch.Tensor:
        spec = self._spec
        rope.rotate_(heads[:, : spec.num_heads + spec.num_kv_heads], table)
        kv = heads[:, spec.num_heads :].view(heads.shape[0], 2, spec.num_kv_heads, spec.head_dim)
        pool.write(layer, slots, kv)
        return heads[:, : spec.num_heads]

    def gated(self, inputs: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
        return self._gated(self.linear(inputs, weight, bias))

    def _gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        silu = self._spec.activation is Activation.SILU
        return (F.silu(gate) if silu else F.gelu(gate, approximate="tanh")).mul_(up)

    def linear(self, inputs: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear(inputs, weight, bias)

    def project(self, projection: KvProjection, hidden: torch.Tensor, rope: Rope) -> torch.Tensor:
        return projection(hidden, rope)

    def project_and_store(
        self, projection: KvProjection, hidden: torch.Tensor, rope: Rope, pool: KvPool, first: int, slots: torch.Tensor
    ) -> None:
        pool.write_layers(first, slots, self.project(projection, hidden, rope))
