"""Attention of single rows over the paged pool on a GPU, in Triton, which torch's builds for GPUs bring along.

A step's K/V are read once, where they lie: torch's operators would have them gathered first, and padded to the longest.
A program takes a part of one sequence for one K/V head, and all query heads that share it as rows of one product; so
that few long sequences keep a whole GPU busy, a second kernel puts the parts together (Flash-Decoding).
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

MAX_HEAD_DIM = 256
# Below the least, a part costs more to put together than it saves; beyond the most, a sequence that is far longer than
# those beside it would still be read by few programs when theirs have ended.
_LEAST_PART_TOKENS, _MOST_PART_TOKENS = 256, 4096
_PROGRAMS_PER_PROCESSOR = 4
_MOST_PARTS = 64  # a power of two
# Triton fetches tiles ahead; those whose slots have to be fetched first need two stages more to come as early.
_STAGES_OF_A_RUN, _STAGES = 3, 5
# Tensor cores multiply no fewer rows.
_LEAST_ROWS = 16
_LOG2_E = 1.4426950408889634


def takes(queries: torch.Tensor, kv: torch.Tensor) -> bool:
    """Whether ``attend_rows`` does: no float64, and heads that are no larger than the registers allow."""
    dtypes = {torch.bfloat16, torch.float16, torch.float32}
    return {queries.dtype, kv.dtype} <= dtypes and queries.shape[-1] <= MAX_HEAD_DIM and queries.stride(-1) == 1


def attend_rows(
    queries: torch.Tensor,
    rows: torch.Tensor,
    kv: torch.Tensor,
    context: torch.Tensor | slice,
    longest: int,
    lengths: torch.Tensor,
    mixed: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> None:
    """Put into ``mixed`` what ``rows`` ``[B]`` (int64) of ``queries``, both ``[any, heads, head_dim]``, mix of ``kv``
    ``[slots, 2, kv_heads, head_dim]``.

    Row ``b`` sees the first ``lengths[b]``, at least one, of its slots ``context[b * longest : (b + 1) * longest]``
    (int64). Scores, weights' sums and what is mixed are float32. Nothing here waits for the GPU.
    """
    num_rows, num_heads, head_dim = len(rows), *queries.shape[1:]
    kv_heads = kv.shape[2]
    shared, padded_dim = num_heads // kv_heads, max(_LEAST_ROWS, triton.next_power_of_2(head_dim))
    # Of K/V at a time: two tiles of each, one of them on its way, are less than the 99 KB that any GPU's processor has
    # which multiplies bfloat16.
    tile = min(64, 16_384 // (padded_dim * max(2, queries.element_size())))
    num_parts = _num_parts(num_rows * kv_heads, longest, _num_processors(queries.device))
    part_tokens = triton.cdiv(triton.cdiv(longest, num_parts), tile) * tile
    num_parts = triton.cdiv(longest, part_tokens)
    partly = queries.new_empty((num_rows, num_heads, num_parts, head_dim), dtype=torch.float32)
    # Of each part the largest score, as a power of two, and the sum of the weights beside it.
    # (Two allocations, for Triton compiles anew what isn't aligned alike.)
    most, sums = (queries.new_empty((num_rows, num_heads, num_parts), dtype=torch.float32) for _ in range(2))
    first_slot, index = (context.start, None) if isinstance(context, slice) else (0, context)
    # Triton asks which device is the current one; of the host's tensors none is.
    with torch.cuda.device_of(queries):  # type: ignore[no-untyped-call]  # torch's own
        _attend_part[(num_rows, kv_heads, num_parts)](
            queries, rows, kv, index, first_slot, lengths, partly, most, sums,
            queries.stride(0), queries.stride(1), longest, part_tokens,
            scale * _LOG2_E if softcap is None else scale / softcap,
            0.0 if softcap is None else softcap * _LOG2_E,
            shared, kv_heads, head_dim,
            max(_LEAST_ROWS, triton.next_power_of_2(shared)), padded_dim, tile, index is None, softcap is not None,
            num_stages=_STAGES_OF_A_RUN if index is None else _STAGES,
        )  # fmt: skip
        _put_together[(num_rows, num_heads)](
            partly, most, sums, rows, mixed, mixed.stride(0), mixed.stride(1), num_parts,
            head_dim, padded_dim, _MOST_PARTS,
        )  # fmt: skip


def _num_parts(num_programs: int, longest: int, num_processors: int) -> int:
    """Of each sequence: as many as keep all processors busy, none of them short, nor very long."""
    busy: int = triton.cdiv(num_processors * _PROGRAMS_PER_PROCESSOR, num_programs)
    least: int = triton.cdiv(longest, _MOST_PART_TOKENS)
    return max(1, min(max(busy, least), longest // _LEAST_PART_TOKENS, _MOST_PARTS))


@cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter, in tests: as on a small GPU
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


# What differs from step to step is compiled once for all values.
@triton.jit(do_not_specialize=["first_slot", "longest", "part_tokens"])  # type: ignore[untyped-decorator]
def _attend_part(  # type: ignore[no-untyped-def]  # Triton's own types
    queries, rows, kv, context, first_slot, lengths, partly, most, sums,
    row_stride, head_stride, longest, part_tokens, scale, softcap,
    shared: tl.constexpr, kv_heads: tl.constexpr, head_dim: tl.constexpr,
    padded_heads: tl.constexpr, padded_dim: tl.constexpr, tile: tl.constexpr,
    is_run: tl.constexpr, has_softcap: tl.constexpr,
):  # fmt: skip
    """One part of one sequence for one K/V head: ``[padded_heads, padded_dim]`` of its query heads, padded."""
    sequence, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_parts = tl.num_programs(2)
    heads, dims, tokens = tl.arange(0, padded_heads), tl.arange(0, padded_dim), tl.arange(0, tile)
    is_head, is_dim = heads < shared, dims < head_dim
    head = kv_head * shared + heads
    row = tl.load(rows + sequence)
    asked = tl.load(
        queries + row * row_stride + head[:, None] * head_stride + dims[None, :],
        mask=is_head[:, None] & is_dim[None, :], other=0.0,
    )  # fmt: skip
    start = part * part_tokens
    end = tl.minimum(tl.load(lengths + sequence).to(tl.int32), start + part_tokens)
    largest = tl.full([padded_heads], float("-inf"), tl.float32)
    total = tl.zeros([padded_heads], tl.float32)
    mixed = tl.zeros([padded_heads, padded_dim], tl.float32)
    for at in range(start, end, tile):
        is_seen = at + tokens < end
        if is_run:
            slots = first_slot + sequence.to(tl.int64) * longest + at + tokens
        else:
            slots = tl.load(context + sequence.to(tl.int64) * longest + at + tokens, mask=is_seen, other=0)
        held = kv + slots[:, None] * (2 * kv_heads * head_dim) + kv_head * head_dim + dims[None, :]
        is_held = is_seen[:, None] & is_dim[None, :]
        keys = tl.load(held, mask=is_held, other=0.0).to(asked.dtype)
        scores = tl.dot(asked, tl.trans(keys), input_precision="ieee") * scale
        if has_softcap:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores) - 1.0)  # tanh
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        now_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - now_largest[:, None])
        shrunk = tl.exp2(largest - now_largest)
        values = tl.load(held + kv_heads * head_dim, mask=is_held, other=0.0).to(asked.dtype)
        mixed = mixed * shrunk[:, None] + tl.dot(weights.to(asked.dtype), values, input_precision="ieee")
        total = total * shrunk + tl.sum(weights, 1)
        largest = now_largest
    # A part beyond the sequence's end has no weight, and nothing else is told of it.
    place = (sequence.to(tl.int64) * kv_heads * shared + head) * num_parts + part
    tl.store(most + place, largest, mask=is_head)
    tl.store(sums + place, total, mask=is_head)
    where = partly + place[:, None] * head_dim + dims[None, :]
    is_told = is_head & (total > 0.0)
    tl.store(where, mixed, mask=is_told[:, None] & is_dim[None, :])


@triton.jit(do_not_specialize=["num_parts"])  # type: ignore[untyped-decorator]
def _put_together(  # type: ignore[no-untyped-def]
    partly, most, sums, rows, mixed, row_stride, head_stride, num_parts,
    head_dim: tl.constexpr, padded_dim: tl.constexpr, most_parts: tl.constexpr,
):  # fmt: skip
    """All parts of one query head, eight at a time."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    dims, eight = tl.arange(0, padded_dim), tl.arange(0, 8)
    is_dim = dims < head_dim
    place = (sequence.to(tl.int64) * tl.num_programs(1) + head) * num_parts
    all_parts = tl.arange(0, most_parts)
    largest = tl.max(tl.load(most + place + all_parts, mask=all_parts < num_parts, other=float("-inf")), 0)
    total = 0.0
    found = tl.zeros([padded_dim], tl.float32)
    for first in range(0, num_parts, 8):
        parts = place + first + eight
        is_part = first + eight < num_parts
        share = tl.exp2(tl.load(most + parts, mask=is_part, other=float("-inf")) - largest)
        total += tl.sum(share * tl.load(sums + parts, mask=is_part, other=0.0), 0)
        held = partly + parts[:, None] * head_dim + dims[None, :]
        part = tl.load(held, mask=(share > 0.0)[:, None] & is_dim[None, :], other=0.0)
        found += tl.sum(share[:, None] * part, 0)
    target = mixed + tl.load(rows + sequence) * row_stride + head * head_stride + dims
    tl.store(target, (found / total).to(mixed.dtype.element_ty), mask=is_dim)
