"""Attention on a GPU: of prompts by torch's fused kernels, of single rows by a Triton kernel over the pool itself."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from shoal.engine.attention import attend, attend_prompt
from shoal.engine.reads import ReadPlanner, Span
from shoal.errors import ConfigError
from shoal.kv.layout import stage_layout
from shoal.kv.pool import KvPool
from shoal.model.batch import AttentionPlan
from shoal.model.families import ModelSpec

# Numbers around one that are mixed of six hundred: what bfloat16 rounds of them is less by an order of magnitude.
_MOST_OFF = 0.05


class GpuAttention:
    """Carries out ``Attend``. ``kernel`` is the module shoal.kernels.paged_attention, which needs Triton to be there;
    what it doesn't take, torch does."""

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


def find_gpu_attention(
    spec: ModelSpec, dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device
) -> GpuAttention:
    """Compiles what ``spec`` needs, and tries it. Raises ConfigError that says why torch must attend: Triton isn't
    there, or can't compile (it wants a C compiler, and a folder to write to), or what it compiled is wrong."""
    try:
        kernel = importlib.import_module("shoal.kernels.paged_attention")
    except ImportError as error:
        raise ConfigError(f"Triton can't be imported: {error}") from error
    found = GpuAttention(kernel)
    try:
        off = _how_far_off(found, spec, dtype, kv_dtype, device)
    except Exception as error:  # Triton's, its compilers' and the driver's own, of many kinds
        raise ConfigError(f"the Triton kernel can't be run: {error}") from error
    if not off < _MOST_OFF:  # nor where it's no number
        raise ConfigError(f"the Triton kernel, tried once, was {off:.2g} off what torch gives")
    return found


@torch.inference_mode()
def _how_far_off(
    attention: GpuAttention, spec: ModelSpec, dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device
) -> float:
    """The largest difference from torch's: of a context in one run, and of a scattered one beside a single token."""
    long, blocks = 600, list(range(38))
    layout = stage_layout(
        num_layers=1, num_kept=1, num_held=1, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim,
        dtype_bytes=kv_dtype.itemsize, block_tokens=16,
    )  # fmt: skip
    pool = KvPool(layout, len(blocks) + 1, dtype=kv_dtype, device=device)
    chance = torch.Generator().manual_seed(0)
    pool.layers[0].copy_(torch.randn(pool.layers[0].shape, generator=chance))
    queries = torch.randn(2, spec.num_heads, spec.head_dim, generator=chance).to(device, dtype)
    planner, last = ReadPlanner(layout, device), Span(blocks[::-1], long - 1, long)
    off = torch.zeros((), device=device)
    for rows in ([Span(blocks, long - 1, long)], [last, Span([len(blocks)], 0, 1)]):
        ours, theirs = (
            way(queries[: len(rows)], pool, 0, planner.plan(rows), scale=0.1, softcap=spec.attention_softcap)
            for way in (attention, attend)
        )
        off = off.maximum((ours - theirs).abs().max())  # what is no number stays none
    return float(off)
