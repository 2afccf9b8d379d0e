"""The decoder's operations on a GPU by Shoal's own Triton kernels; products, and attention of prompts, are torch's."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from shoal.engine.attention import attend, attend_prompt
from shoal.engine.reads import ReadPlanner, Span
from shoal.errors import ConfigError
from shoal.kv.layout import stage_layout
from shoal.kv.pool import KvPool
from shoal.messages import Stage
from shoal.model.batch import AttentionPlan
from shoal.model.decoder import Decoder
from shoal.model.families import Activation, ModelSpec
from shoal.model.matrix import Weight
from shoal.model.parameters import Parameters
from shoal.model.plan import LayerPlan
from shoal.model.rope import Rope
from shoal.model.rows import RowOps, TorchRows

# What is mixed and normed of numbers around one: what bfloat16 rounds of them is less by an order of magnitude.
_MOST_OFF = 0.05


class GpuAttention:
    """Carries out ``Attend``: single rows by a kernel over the pool itself, prompts by torch's fused ones. ``kernel``
    is the module shoal.kernels.paged_attention; what it doesn't take, torch does."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __call__(
        self,
        queries: torch.Tensor,
        pool: KvPool,
        layer: int,
        reads: AttentionPlan,
        *,
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        held = pool.layers[layer]
        if not reads.groups or not self._kernel.takes(queries, held):
            return attend(queries, pool, layer, reads, scale=scale, softcap=softcap)
        mixed = queries.new_empty(queries.shape)
        for segment in reads.prompts:
            rows = slice(segment.row_start, segment.row_end)
            mixed[rows] = attend_prompt(queries[rows], pool, layer, segment, scale, softcap)
        for group in reads.groups:
            self._kernel.attend_rows(
                queries, group.rows, held, group.context, group.longest, group.lengths, mixed,
                scale=scale, softcap=softcap,
            )  # fmt: skip
        return mixed


class GpuRows(TorchRows):
    """Carries out ``RowOps``. ``kernel`` is the module shoal.kernels.gpu_rows; what it doesn't take, torch does."""

    def __init__(self, spec: ModelSpec, kernel: Any) -> None:
        super().__init__(spec)
        self._kernel = kernel
        self._is_gelu = spec.activation is not Activation.SILU

    def norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if not self._norms(hidden, weight):
            return super().norm(hidden, weight)
        flat = hidden.reshape(-1, hidden.shape[-1]).contiguous()  # one head of several is a view that isn't
        normed: torch.Tensor = self._kernel.add_norm(flat, None, weight, self._spec.norm_eps)[1]
        return normed.view(hidden.shape)

    def add_norm(
        self, hidden: torch.Tensor, added: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not (self._norms(hidden, added, weight) and hidden.is_contiguous() and added.is_contiguous()):
            return super().add_norm(hidden, added, weight)
        total, normed = self._kernel.add_norm(hidden, added, weight, self._spec.norm_eps)
        return total, normed

    def _norms(self, hidden: torch.Tensor, *others: torch.Tensor) -> bool:
        is_small = 0 < hidden.shape[-1] <= self._kernel.MAX_HIDDEN
        return bool(is_small and hidden.numel() and self._kernel.takes(hidden, *others))

    def rotate_and_store(
        self, heads: torch.Tensor, rope: Rope, table: int, pool: KvPool, layer: int, slots: torch.Tensor
    ) -> torch.Tensor:
        num_heads, held = self._spec.num_heads, pool.layers[layer]
        cos, sin = rope.cos[table], rope.sin[table]
        is_plain = heads.stride()[1:] == (heads.shape[2], 1) and cos.is_contiguous() and sin.is_contiguous()
        if not (heads.numel() and is_plain and self._kernel.takes(heads, cos, sin, held)):
            return super().rotate_and_store(heads, rope, table, pool, layer, slots)
        self._kernel.rotate_store(heads, num_heads, cos, sin, held, slots)
        return heads[:, :num_heads]

    def gated(self, inputs: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
        gate_up = self.linear(inputs, weight, bias)
        if not (gate_up.numel() and gate_up.is_contiguous() and self._kernel.takes(gate_up)):
            return self._gated(gate_up)
        gated: torch.Tensor = self._kernel.gate(gate_up, is_gelu=self._is_gelu)
        return gated


@dataclass(frozen=True, slots=True)
class GpuKernels:
    """What a decoder on a GPU is made with."""

    attention: GpuAttention
    rows: GpuRows

    def decoder(self, spec: ModelSpec, plan: LayerPlan, stage: Stage, parameters: Parameters) -> Decoder:
        return Decoder(spec, plan, stage, parameters, self.attention, self.rows)


def find_gpu_kernels(spec: ModelSpec, dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device) -> GpuKernels:
    """Compiles what ``spec`` needs, and tries it. Raises ConfigError that says why torch must compute: Triton isn't
    there, or can't compile (it wants a C compiler, and a folder to write to), or what it compiled is wrong."""
    try:
        attention, rows = (importlib.import_module(f"shoal.kernels.{name}") for name in ("paged_attention", "gpu_rows"))
    except ImportError as error:
        raise ConfigError(f"Triton can't be imported: {error}") from error
    found, trial = GpuKernels(GpuAttention(attention), GpuRows(spec, rows)), _Trial(spec, dtype, kv_dtype, device)
    try:
        is_taken = attention.takes(trial.queries(1), trial.pool(1).layers[0])
        most_off = max(trial.attention(found), trial.rows(found), key=_how_bad) if is_taken else 0.0
    except Exception as error:  # Triton's, its compilers' and the driver's own, of many kinds
        raise ConfigError(f"Triton's kernels can't be run: {error}") from error
    if not is_taken:
        raise ConfigError(f"Triton's kernels take no heads of {spec.head_dim} numbers in {dtype}, K/V in {kv_dtype}")
    if not most_off < _MOST_OFF:  # nor where it's no number
        raise ConfigError(f"Triton's kernels, tried once, were {most_off:.2g} off what torch gives")
    return found


def _how_bad(off: float) -> float:
    return math.inf if math.isnan(off) else off


class _Trial:
    """Kernels against torch, on random numbers: the largest difference between what they give."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device) -> None:
        self._spec = spec
        self._dtype = dtype
        self._kv_dtype = kv_dtype
        self._device = device
        self._chance = torch.Generator().manual_seed(0)

    @torch.inference_mode()
    def attention(self, kernels: GpuKernels) -> float:
        """Of a context in one run, and of scattered ones of a like length beside a single token."""
        long, blocks = 600, list(range(38))
        pool, queries = self.pool(len(blocks) + 1), self.queries(4)
        planner = ReadPlanner(pool.layout, self._device)
        several = [Span(blocks[::-1], end - 1, end) for end in (long, long - 1, long - 70)]
        pairs = []
        for rows in ([Span(blocks, long - 1, long)], [*several, Span([len(blocks)], 0, 1)]):
            reads = planner.plan(rows)
            pairs += [
                way(queries[: len(rows)], pool, 0, reads, scale=0.1, softcap=self._spec.attention_softcap)
                for way in (kernels.attention, attend)
            ]
        return _most_off(pairs[::2], pairs[1::2])

    @torch.inference_mode()
    def rows(self, kernels: GpuKernels) -> float:
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

        return _most_off(told(kernels.rows), told(TorchRows(spec)))

    def queries(self, count: int) -> torch.Tensor:
        """As they lie beside K and V."""
        return self._heads(count)[:, : self._spec.num_heads]

    def _heads(self, count: int) -> torch.Tensor:
        return self._random(count, self._spec.num_heads + 2 * self._spec.num_kv_heads, self._spec.head_dim)

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

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._chance).to(self._device, self._dtype)


def _most_off(ours: Iterable[torch.Tensor], theirs: Iterable[torch.Tensor]) -> float:
    most = [(mine.float() - other.float()).abs().max() for mine, other in zip(ours, theirs, strict=True)]
    return float(torch.stack(most).max())  # torch's, which what is no number stays
