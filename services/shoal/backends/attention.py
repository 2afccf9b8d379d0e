"""Attention over the paged pool, behind one function (``attend``), with torch's own operators.

Queries of grouped heads share their K/V head by a stride-0 view or as rows of one product, so K/V are never expanded.
Each call gathers only the blocks that its sequences hold, or takes a view where they lie in one run.
"""

from __future__ import annotations

import importlib
from functools import cache, lru_cache

import torch
import torch.nn.functional as F

from shoal.model.batch import AttentionPlan, DecodeGroup, PromptSegment
from shoal.model.kv_pool import KvPool
from shoal.process.machine import cpu_flags

# Rows of a prompt that are attended to at a time: a small model's scores of them are some megabytes.
BLOCK_ROWS = 128

_BIASES = "torch.nn.attention.bias"


def prepare_attention(device: torch.device) -> None:
    """What torch's attention is to load and to choose on ``device`` before anybody waits for it.

    cuDNN's, which torch prefers on some GPUs, makes a plan for each length that is new, while a prompt waits, and keeps
    it.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
        importlib.import_module(_BIASES)


def attend(
    queries: torch.Tensor,
    pool: KvPool,
    layer: int,
    reads: AttentionPlan,
    *,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Mix what each row may see: ``queries`` ``[rows, heads, head_dim]`` -> the same shape.

    Scores ``q k`` are multiplied by ``scale``, then, with a ``softcap`` c, turned into ``c tanh(score / c)``. The rows'
    own K/V must already be in the pool.
    """
    if len(reads.prompts) == 1 and not reads.groups:
        return attend_prompt(queries, pool, layer, reads.prompts[0], scale, softcap)
    if len(reads.groups) == 1 and not reads.prompts:  # then its rows are all there are, in their order
        return _decode(queries, pool, layer, reads.groups[0], scale, softcap)
    mixed = torch.empty_like(queries, memory_format=torch.contiguous_format)
    for segment in reads.prompts:
        rows = slice(segment.row_start, segment.row_end)
        mixed[rows] = attend_prompt(queries[rows], pool, layer, segment, scale, softcap)
    for group in reads.groups:
        mixed[group.rows] = _decode(queries[group.rows], pool, layer, group, scale, softcap)
    return mixed


def attend_prompt(
    queries: torch.Tensor, pool: KvPool, layer: int, segment: PromptSegment, scale: float, softcap: float | None
) -> torch.Tensor:
    """Many rows of one sequence, ``[rows, heads, head_dim]``: batch = K/V heads, heads = queries that share one."""
    rows, num_heads, head_dim = queries.shape
    kv = pool.read(layer, segment.context).to(queries.dtype)
    num_context, _, kv_heads, _ = kv.shape
    shared = num_heads // kv_heads
    if rows >= 2 * BLOCK_ROWS and _suits_blocks(queries) and not kv.requires_grad:
        return by_blocks(queries, kv, segment, scale, softcap)
    grouped = queries.view(rows, kv_heads, shared, head_dim).permute(1, 2, 0, 3)
    keys, values = (
        kv[:, part].transpose(0, 1).unsqueeze(1).expand(kv_heads, shared, num_context, head_dim) for part in (0, 1)
    )
    mask = segment.mask
    if mask is not None and segment.window is None and softcap is None and _may_be_flash(queries):
        mask = _last_rows(rows, num_context)
    mixed = _mix(grouped, keys, values, mask, mask is None, scale, softcap)
    return mixed.permute(2, 0, 1, 3).reshape(rows, num_heads, head_dim)


def _may_be_flash(queries: torch.Tensor) -> bool:
    """Whether torch has FlashAttention, which takes no mask, but knows rows that follow others."""
    return queries.is_cuda


@lru_cache(maxsize=1)  # each takes memory, though nothing is written there; layers want the same, one after the other
def _last_rows(num_rows: int, num_context: int) -> torch.Tensor:
    """What says to torch that rows are the last of their context. Its module loads torch's compiler, a second's work
    that a CPU is spared."""
    bias = importlib.import_module(_BIASES)
    last: torch.Tensor = bias.causal_lower_right(num_rows, num_context)
    return last


@cache
def are_blocks_quicker() -> bool:
    """Whether bfloat16 takes less time by blocks than by torch's fused kernel: where the processor multiplies it, but
    has no matrix unit, which the fused kernel knows to use. (float32 takes longer by blocks.)"""
    flags = cpu_flags()
    return "avx512_bf16" in flags and "amx_bf16" not in flags


def _suits_blocks(queries: torch.Tensor) -> bool:
    is_plain = queries.device.type == "cpu" and not queries.requires_grad
    return is_plain and queries.dtype is torch.bfloat16 and are_blocks_quicker()


def by_blocks(
    queries: torch.Tensor, kv: torch.Tensor, segment: PromptSegment, scale: float, softcap: float | None
) -> torch.Tensor:
    """What the rows of ``segment`` mix of ``kv`` ``[context, 2, kv_heads, head_dim]``, some of them at a time.

    The query heads that share a K/V head are rows of one product, and nothing is multiplied that comes after the last
    of its rows. Scores are rounded to the dtype of ``queries`` ``[rows, heads, head_dim]``, sums are float32. What all
    keys of a head have in common adds the same to each of a row's scores, and so nothing to what it mixes: without it,
    as biases of keys may bring, scores are small enough to be held.
    """
    rows, num_heads, head_dim = queries.shape
    num_context, _, kv_heads, _ = kv.shape
    shared = num_heads // kv_heads
    num_before = num_context - rows
    keys = kv[:, 0] if softcap is not None else kv[:, 0] - kv[:, 0].mean(dim=0)
    keys, values = keys.permute(1, 2, 0), kv[:, 1].transpose(0, 1)
    alpha = scale if softcap is None else scale / softcap
    grouped = queries.view(rows, kv_heads, shared, head_dim)
    mixed = torch.empty_like(grouped, memory_format=torch.contiguous_format)
    comes_later = torch.ones(BLOCK_ROWS, BLOCK_ROWS, dtype=torch.bool, device=queries.device).triu(1)
    unused = queries.new_empty(())
    start = 0
    while start < rows:
        # What is seen ends at multiples, wherever a prompt is cut: oneDNN compiles a product for each new shape.
        num_seen = min(num_context, BLOCK_ROWS * ((num_before + start) // BLOCK_ROWS + 1))
        end = num_seen - num_before
        asked = grouped[start:end].permute(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
        # Scaled before they are rounded, which bmm couldn't. Of ``unused`` nothing is read.
        scores = torch.baddbmm(unused, asked, keys[:, :, :num_seen], beta=0, alpha=alpha)
        if softcap is not None:
            scores.tanh_().mul_(softcap)
        of_rows = scores.view(kv_heads, shared, end - start, num_seen)
        if segment.window is None or segment.mask is None:  # what comes before its own rows, each of them may see
            of_rows[..., num_before + start :].masked_fill_(comes_later[: end - start, : end - start], float("-inf"))
        else:
            of_rows.masked_fill_(~segment.mask[start:end, :num_seen], float("-inf"))
        found = torch.bmm(scores.softmax(dim=-1), values[:, :num_seen])
        mixed[start:end] = found.view(kv_heads, shared, end - start, head_dim).permute(2, 0, 1, 3)
        start = end
    return mixed.view(rows, num_heads, head_dim)


def _decode(
    queries: torch.Tensor, pool: KvPool, layer: int, group: DecodeGroup, scale: float, softcap: float | None
) -> torch.Tensor:
    """One row each of many sequences: batch = sequences, heads = K/V heads, rows = the queries that share one."""
    batch, num_heads, head_dim = queries.shape
    kv = pool.read(layer, group.context).to(queries.dtype)
    kv_heads = kv.shape[2]
    kv = kv.view(batch, group.longest, 2, kv_heads, head_dim).permute(2, 0, 3, 1, 4)
    grouped = queries.view(batch, kv_heads, num_heads // kv_heads, head_dim)
    mixed = _mix(grouped, kv[0], kv[1], group.mask, False, scale, softcap)
    return mixed.reshape(batch, num_heads, head_dim)


def _mix(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """All ``[batch, heads, rows or context, head_dim]``. torch's kernels know no softcap: with one it's written out."""
    if softcap is None:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=is_causal, scale=scale)
    scores = (queries @ keys.transpose(-1, -2)).mul_(scale / softcap).tanh_() * softcap
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill_(~mask, float("-inf"))
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(dim=-1, dtype=wide).to(values.dtype) @ values
