"""Whether kernels give what torch's operators give, on random numbers, before anybody's answer depends on it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from shoal.backends.attention import attend
from shoal.model.decoder import Attend
from shoal.model.families import ModelSpec
from shoal.model.kv_layout import stage_layout
from shoal.model.kv_pool import KvPool
from shoal.model.reads import ReadPlanner, Span
from shoal.model.rope import Rope
from shoal.model.rows import RowOps, TorchRows


class GpuTrial:
    """Of what a model of ``spec`` asks for in ``dtype``, with K/V in ``kv_dtype``."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device) -> None:
        self._spec = spec
        self._dtype = dtype
        self._kv_dtype = kv_dtype
        self._device = device
        self._chance = torch.Generator().manual_seed(0)

    @torch.inference_mode()
    def most_off(self, attention: Attend, rows: RowOps) -> float:
        """The largest difference from what torch gives of numbers around one; NaN where something is no number."""
        pairs = [*self._mixed(attention), *self._told(rows)]
        return float(torch.stack([(ours.float() - theirs.float()).abs().max() for ours, theirs in pairs]).max())

    def _mixed(self, attention: Attend) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Of a context in one run, and of scattered ones of a like length beside a single token."""
        long, blocks = 600, list(range(38))
        pool, queries = self.pool(len(blocks) + 1), self.queries(4)
        planner = ReadPlanner(pool.layout, self._device)
        several = [Span(blocks[::-1], end - 1, end) for end in (long, long - 1, long - 70)]
        for rows in ([Span(blocks, long - 1, long)], [*several, Span([len(blocks)], 0, 1)]):
            reads = planner.plan(rows)
            ours, theirs = (
                way(queries[: len(rows)], pool, 0, reads, scale=0.1, softcap=self._spec.attention_softcap)
                for way in (attention, attend)
            )
            yield ours, theirs

    def _told(self, rows: RowOps) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Of a layer's: norms of rows and of heads, rotation, what the pool holds then, gate."""
        spec, count = self._spec, 3
        hidden, added = self._random(2, count, spec.hidden_size) / 4
        wide = torch.float32 if spec.norm_offset else self._dtype
        weight, head_weight = (self._random(size).to(wide) / 4 for size in (spec.hidden_size, spec.head_dim))
        heads, gate_up = self._heads(count) / 2, self._random(2 * spec.intermediate_size, 32) / 2
        slots = torch.tensor([5, 0, 9], device=self._device)
        rope = Rope.at(spec, torch.arange(100, 100 + count, device=self._device), self._dtype)

        def told(ops: RowOps) -> Iterator[torch.Tensor]:
            yield ops.norm(hidden, weight)
            yield from ops.add_norm(hidden, added, weight)
            for some in (slice(0, spec.num_heads), slice(0, 1)):
                yield ops.norm(heads[:, some], head_weight)
            pool = self.pool(1)
            pool.layers[0].zero_()
            yield ops.rotate_and_store(heads.clone(), rope, 0, pool, 0, slots)
            yield pool.layers[0]
            yield ops.gated(torch.eye(count, 32, dtype=self._dtype, device=self._device), gate_up, None)

        return zip(told(rows), told(TorchRows(spec)), strict=True)

    def queries(self, count: int) -> torch.Tensor:
        """``[count, heads, head_dim]``, as they lie beside K and V."""
        return self._heads(count)[:, : self._spec.num_heads]

    def pool(self, num_blocks: int) -> KvPool:
        """Of one layer."""
        spec = self._spec
        layout = stage_layout(
            num_layers=1, num_kept=1, num_held=1, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim,
            dtype_bytes=self._kv_dtype.itemsize, block_tokens=16,
        )  # fmt: skip
        pool = KvPool(layout, num_blocks, dtype=self._kv_dtype, device=self._device)
        pool.layers[0].copy_(self._random(*pool.layers[0].shape))
        return pool

    def _heads(self, count: int) -> torch.Tensor:
        return self._random(count, self._spec.num_heads + 2 * self._spec.num_kv_heads, self._spec.head_dim)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._chance).to(self._device, self._dtype)
