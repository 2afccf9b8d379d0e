"""The transformer of all families, run over a layer plan.

One forward may hold tokens of both depths. All rows run the kept layers; then the shallow rows' K/V of the skipped
layers are projected and stored; then only the full-depth rows run on, reading what was just stored. A stage without
deep layers stores the states instead, which ``project`` makes those K/V of. A SPEED plan projects nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from shoal.errors import InternalError
from shoal.model.batch import AttentionPlan, StepBatch
from shoal.model.families import ModelSpec
from shoal.model.kv_pool import KvPool
from shoal.model.parameters import LayerParameters, Parameters
from shoal.model.plan import LayerPlan
from shoal.model.projection import KvProjection
from shoal.model.rope import Rope
from shoal.model.rows import RowOps, TorchRows
from shoal.wire.messages import Stage


class Attend(Protocol):
    """Attention over the pool (backends/attention.py): ``queries`` ``[rows, heads, head_dim]`` -> the same shape."""

    def __call__(
        self,
        queries: torch.Tensor,
        pool: KvPool,
        layer: int,
        reads: AttentionPlan,
        *,
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor: ...


class RunLayers(Protocol):
    """Several layers at once (native_layers.py): the states ``[rows, hidden]`` that leave the last of them, or
    ``None`` where it can't, and nothing was done. ``progressed`` is called before each layer that may take long."""

    def __call__(
        self,
        layers: range,
        hidden: torch.Tensor,
        rope: Rope,
        pool: KvPool,
        reads: AttentionPlan,
        progressed: Callable[[], None],
    ) -> torch.Tensor | None: ...


@dataclass(frozen=True, slots=True)
class StepTensors:
    """What a forward brings: ``logits`` ``[len(logit_rows), vocab]`` (``None`` without an lm_head).

    ``scored`` ``[len(scored_rows), hidden]`` are states that left the last layer, for ``logits`` to be made of them."""

    logits: torch.Tensor | None
    scored: torch.Tensor | None = None


class Decoder:
    """Runs ``plan`` with the parameters that ``stage`` holds. ``rows`` are torch's by default; layers run one by one
    where there is no ``run_layers``, or it can't."""

    def __init__(
        self,
        spec: ModelSpec,
        plan: LayerPlan,
        stage: Stage,
        parameters: Parameters,
        attend: Attend,
        rows: RowOps | None = None,
        run_layers: RunLayers | None = None,
    ) -> None:
        self.spec = spec
        self.plan = plan
        self.stage = stage
        self.parameters = parameters
        self._attend = attend
        self._rows = rows or TorchRows(spec)
        self._run_layers = run_layers
        self.progressed: Callable[[], None] = lambda: None
        """Called as something begins that takes its time: a layer, or all of them where they are one call. Python that
        prepares it comes before: what others do then in their threads holds up no step."""
        # Through float32 to the activations' dtype, as transformers rounds it.
        self._embedding_scale = torch.tensor(spec.embedding_scale, dtype=torch.float32).to(self.dtype).item()

    @property
    def dtype(self) -> torch.dtype:
        return self.parameters.embedding.dtype

    @torch.inference_mode()
    def forward(self, batch: StepBatch, pool: KvPool) -> StepTensors:
        """Run one step; K/V of every row are in ``pool`` afterwards."""
        rope, hidden = Rope.at(self.spec, batch.positions, self.dtype), self.embed(batch.token_ids)
        skips_nothing = not self.plan.num_skipped and batch.full_rows is None
        if batch.deep is batch.kept or skips_nothing:  # all rows run all layers, and alike
            return self._told(batch, self._run(range(self.plan.num_layers), hidden, rope, pool, batch.kept))
        return self.deepen(batch, self._run(self.plan.kept, hidden, rope, pool, batch.kept), rope, pool)

    def states(self, batch: StepBatch, rope: Rope, pool: KvPool) -> Iterator[torch.Tensor]:
        """The states ``[rows, hidden]`` that enter the first kept layer, and those that leave each of them."""
        hidden = self.embed(batch.token_ids)
        yield hidden
        for layer in self.plan.kept:
            hidden = self._layer(layer, hidden, rope, pool, batch.kept)
            yield hidden

    def deepen(self, batch: StepBatch, hidden: torch.Tensor, rope: Rope, pool: KvPool) -> StepTensors:
        """The rest of a step from the states that left the last kept layer; can be differentiated."""
        self._store_deep(batch, hidden, rope, pool)
        if batch.full_rows is not None:
            hidden, rope = hidden[batch.full_rows], rope.rows(batch.full_rows)
        if batch.deep is not None:
            hidden = self._run(self.plan.skipped, hidden, rope, pool, batch.deep)
        return self._told(batch, hidden)

    def _told(self, batch: StepBatch, hidden: torch.Tensor) -> StepTensors:
        """What a step brings, from the states that left its last layer."""
        scored = None if batch.scored_rows is None else hidden[batch.scored_rows]
        return StepTensors(self.logits(hidden, batch.logit_rows), scored)

    def _run(self, layers: range, hidden: torch.Tensor, rope: Rope, pool: KvPool, reads: AttentionPlan) -> torch.Tensor:
        if self._run_layers is not None:
            out = self._run_layers(layers, hidden, rope, pool, reads, self.progressed)
            if out is not None:
                return out
        for layer in layers:
            hidden = self._layer(layer, hidden, rope, pool, reads)
        return hidden

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The states ``[tokens, hidden]`` that enter the first layer."""
        hidden = self._rows.embed(self.parameters.embedding, token_ids)
        return hidden if self._embedding_scale == 1.0 else hidden.mul_(self._embedding_scale)

    @torch.inference_mode()
    def project(self, states: torch.Tensor, positions: torch.Tensor, layers: range | None = None) -> torch.Tensor:
        """K/V of the skipped layers, or of ``layers`` of them, ``[S, tokens, 2, kv_heads, head_dim]`` of shallow tokens
        at ``positions`` ``[tokens]``, from the ``states`` ``[tokens, hidden]`` that left the last kept layer."""
        projection, rope = self._projection(), Rope.at(self.spec, positions, self.dtype)
        if layers is not None:
            projection = projection.part(layers.start - self.plan.num_kept, layers.stop - self.plan.num_kept)
        return self._rows.project(projection, states.to(self.dtype), rope)

    def _projection(self) -> KvProjection:
        if self.parameters.projection is None:
            raise InternalError("a plan that projects, and no projection")
        self.progressed()
        return self.parameters.projection

    def _store_deep(self, batch: StepBatch, hidden: torch.Tensor, rope: Rope, pool: KvPool) -> None:
        """K/V of the shallow rows in the skipped layers, or what they can be made of."""
        rows = batch.shallow_rows
        if (isinstance(rows, torch.Tensor) and rows.numel() == 0) or not self.plan.projects:
            return
        slots = batch.kept.slots
        if rows is not None:
            hidden, rope, slots = hidden[rows], rope.rows(rows), slots[rows]
        if self.stage is Stage.PREFILL:
            pool.write_states(slots, hidden)
        else:
            self._rows.project_and_store(self._projection(), hidden, rope, pool, self.plan.num_kept, slots)

    def _layer(self, index: int, hidden: torch.Tensor, rope: Rope, pool: KvPool, reads: AttentionPlan) -> torch.Tensor:
        self.progressed()
        layer = self.parameters.layers[index]
        mixed = self._attention(index, layer, self._rows.norm(hidden, layer.input_norm), rope, pool, reads)
        mixed = self._norm_if(mixed, layer.attention_post_norm)
        hidden, normed = self._rows.add_norm(hidden, mixed, layer.mlp_norm)
        return self._rows.add(hidden, self._norm_if(self._mlp(layer, normed), layer.mlp_post_norm))

    def _attention(
        self, index: int, layer: LayerParameters, normed: torch.Tensor, rope: Rope, pool: KvPool, reads: AttentionPlan
    ) -> torch.Tensor:
        spec, rows = self.spec, normed.shape[0]
        looks = spec.layers[index]
        heads = self._rows.linear(normed, layer.qkv, layer.qkv_bias).view(rows, -1, spec.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            queries = self._rows.norm(heads[:, : spec.num_heads], layer.q_norm)
            keys = self._rows.norm(heads[:, spec.num_heads : spec.num_heads + spec.num_kv_heads], layer.k_norm)
            # A new tensor, for a gradient needs what was normed.
            heads = torch.cat([queries, keys, heads[:, spec.num_heads + spec.num_kv_heads :]], dim=1)
        queries = self._rows.rotate_and_store(heads, rope, looks.rope, pool, index, reads.slots)
        mixed = self._attend(
            queries, pool, index, reads.within(looks.window), scale=spec.attention_scale, softcap=spec.attention_softcap
        )
        return self._rows.linear(mixed.reshape(rows, spec.q_size), layer.out, layer.out_bias)

    def _mlp(self, layer: LayerParameters, normed: torch.Tensor) -> torch.Tensor:
        gated = self._rows.gated(normed, layer.gate_up, layer.gate_up_bias)
        return self._rows.linear(gated, layer.down, layer.down_bias)

    def _norm_if(self, hidden: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return hidden if weight is None else self._rows.norm(hidden, weight)

    def logits(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
        """``[len(rows), vocab]`` of states that left the last layer; ``None`` where the stage holds no lm_head."""
        norm, head = self.parameters.final_norm, self.parameters.lm_head
        if norm is None or head is None or rows.numel() == 0:
            return None
        self.progressed()
        normed = self._rows.norm(hidden.index_select(0, rows), norm)
        return self.capped(self._rows.linear(normed, head))

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits as the family has them; those given are of no use then."""
        cap = self.spec.logit_softcap
        return logits if cap is None else logits.div_(cap).tanh_() * cap
