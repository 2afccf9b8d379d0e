"""The transformer of all families, run over a layer plan.

One forward may hold tokens of both depths. All rows run the kept layers; then the shallow rows' K/V of the skipped
layers are projected and stored (or handed to the caller, where this stage holds no deep layers); then only the
full-depth rows run on, reading what was just stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from shoal.errors import InternalError
from shoal.kv.pool import KvPool
from shoal.messages import Stage
from shoal.model.batch import AttentionPlan, StepBatch
from shoal.model.families import ModelSpec
from shoal.model.norm import rms_norm
from shoal.model.parameters import LayerParameters, Parameters
from shoal.model.plan import LayerPlan
from shoal.model.rope import Rope

# (queries [rows, heads, head_dim], pool, layer, how to read it) -> [rows, heads, head_dim]
Attend = Callable[[torch.Tensor, KvPool, int, AttentionPlan], torch.Tensor]


@dataclass(frozen=True, slots=True)
class StepTensors:
    """What a forward brings: ``logits`` ``[len(logit_rows), vocab]`` (``None`` without an lm_head), and at a stage
    without deep layers the shallow rows' ``projected`` K/V ``[S, shallow rows, 2, kv_heads, head_dim]``."""

    logits: torch.Tensor | None
    projected: torch.Tensor | None


class Decoder:
    """Runs ``plan`` with the parameters that ``stage`` holds."""

    def __init__(self, spec: ModelSpec, plan: LayerPlan, stage: Stage, parameters: Parameters, attend: Attend) -> None:
        self.spec = spec
        self.plan = plan
        self.stage = stage
        self.parameters = parameters
        self._attend = attend

    @property
    def dtype(self) -> torch.dtype:
        return self.parameters.embedding.dtype

    @torch.inference_mode()
    def forward(self, batch: StepBatch, pool: KvPool) -> StepTensors:
        """Run one step; K/V of every row are in ``pool`` afterwards."""
        hidden = F.embedding(batch.token_ids, self.parameters.embedding)
        rope = Rope.at(self.spec, batch.positions, self.dtype)
        for layer in self.plan.kept:
            hidden = self._layer(layer, hidden, rope, pool, batch.kept)
        projected = self._project(batch, hidden, rope, pool)
        if batch.full_rows is not None:
            hidden, rope = hidden[batch.full_rows], rope.rows(batch.full_rows)
        if batch.deep is not None:
            for layer in self.plan.skipped:
                hidden = self._layer(layer, hidden, rope, pool, batch.deep)
        return StepTensors(self._logits(hidden, batch.logit_rows), projected)

    def _project(self, batch: StepBatch, hidden: torch.Tensor, rope: Rope, pool: KvPool) -> torch.Tensor | None:
        rows = batch.shallow_rows
        if rows is not None and rows.numel() == 0:
            return None
        if self.parameters.projection is None:
            raise InternalError("shallow rows in a plan that skips nothing")
        if rows is not None:
            hidden, rope = hidden[rows], rope.rows(rows)
        projected = self.parameters.projection(hidden, rope)
        if self.stage is Stage.PREFILL:
            return projected
        slots = batch.kept.slots if rows is None else batch.kept.slots[rows]
        pool.write_layers(self.plan.num_kept, slots, projected)
        return None

    def _layer(self, index: int, hidden: torch.Tensor, rope: Rope, pool: KvPool, reads: AttentionPlan) -> torch.Tensor:
        layer = self.parameters.layers[index]
        hidden = hidden + self._attention(index, layer, self._norm(hidden, layer.input_norm), rope, pool, reads)
        return hidden + _mlp(layer, self._norm(hidden, layer.post_norm))

    def _attention(
        self, index: int, layer: LayerParameters, normed: torch.Tensor, rope: Rope, pool: KvPool, reads: AttentionPlan
    ) -> torch.Tensor:
        spec, rows = self.spec, normed.shape[0]
        heads = F.linear(normed, layer.qkv, layer.qkv_bias).view(rows, -1, spec.head_dim)
        rope.rotate_(heads[:, : spec.num_heads + spec.num_kv_heads])
        kv = heads[:, spec.num_heads :].view(rows, 2, spec.num_kv_heads, spec.head_dim)
        pool.write(index, reads.slots, kv)
        mixed = self._attend(heads[:, : spec.num_heads], pool, index, reads)
        return F.linear(mixed.reshape(rows, spec.q_size), layer.out, layer.out_bias)

    def _norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden, weight, self.spec.norm_eps)

    def _logits(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
        norm, head = self.parameters.final_norm, self.parameters.lm_head
        if norm is None or head is None or rows.numel() == 0:
            return None
        return F.linear(self._norm(hidden[rows], norm), head)


def _mlp(layer: LayerParameters, normed: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
    return F.linear(F.silu(gate).mul_(up), layer.down, layer.down_bias)
