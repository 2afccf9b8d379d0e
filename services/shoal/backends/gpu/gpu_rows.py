"""What happens to rows between the products on a GPU, in Triton: each is one pass over the memory, where torch's
operators would take three to six. All is computed in float32, and rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_HIDDEN = 16_384  # a row is held by one program
_HEADS_AT_ONCE = 8
_GATES_AT_ONCE = 1024


def takes(*tensors: torch.Tensor) -> bool:
    """Whether these functions do: no float64, and no gradients."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return all(tensor.dtype in dtypes and not tensor.requires_grad for tensor in tensors)


def add_norm(
    hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``hidden + added``, ``hidden`` itself where there is none to add, and its RMS norm times ``weight``
    ``[size]``; all others are ``[rows, size]``, contiguous."""
    rows, size = hidden.shape
    normed, total = torch.empty_like(hidden), hidden if added is None else torch.empty_like(hidden)
    padded = triton.next_power_of_2(size)
    with torch.cuda.device_of(hidden):  # type: ignore[no-untyped-call]  # torch's own
        _add_norm[(rows,)](
            hidden,
            added,
            weight,
            total,
            normed,
            eps,
            size,
            padded,
            added is not None,
            num_warps=8 if size > 2048 else 4,
        )
    return total, normed


def rotate_store(
    heads: torch.Tensor,
    num_heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pool: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """``heads`` ``[rows, num_heads + 2 kv_heads, head_dim]`` (rows may be apart): queries are rotated in place, keys on
    their way into ``pool`` ``[slots, 2, kv_heads, head_dim]`` at ``slots`` ``[rows]`` (int64); ``cos`` and ``sin`` are
    ``[rows, head_dim / 2]``, contiguous."""
    rows, all_heads, head_dim = heads.shape
    half = head_dim // 2
    with torch.cuda.device_of(heads):  # type: ignore[no-untyped-call]  # torch's own
        _rotate_store[(rows, triton.cdiv(all_heads, _HEADS_AT_ONCE))](
            heads, heads.stride(0), cos, sin, pool, slots, num_heads, pool.shape[2], half,
            triton.next_power_of_2(half), _HEADS_AT_ONCE,
        )  # fmt: skip


def gate(gate_up: torch.Tensor, *, is_gelu: bool) -> torch.Tensor:
    """``activation(gate) * up`` ``[rows, size]`` of ``gate_up`` ``[rows, 2 size]``, contiguous."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    gated = gate_up.new_empty(rows, size)
    with torch.cuda.device_of(gate_up):  # type: ignore[no-untyped-call]  # torch's own
        _gate[(rows, triton.cdiv(size, _GATES_AT_ONCE))](gate_up, gated, size, _GATES_AT_ONCE, is_gelu)
    return gated


@triton.jit  # type: ignore[untyped-decorator]
def _add_norm(  # type: ignore[no-untyped-def]  # Triton's own types
    hidden, added, weight, total, normed, eps,
    size: tl.constexpr, padded: tl.constexpr, is_added: tl.constexpr,
):  # fmt: skip
    """One row."""
    columns = tl.arange(0, padded)
    is_there = columns < size
    place = tl.program_id(0).to(tl.int64) * size + columns
    row = tl.load(hidden + place, mask=is_there, other=0.0).to(tl.float32)
    if is_added:
        row += tl.load(added + place, mask=is_there, other=0.0).to(tl.float32)
        rounded = row.to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=is_there)
        row = rounded.to(tl.float32)  # the norm is of what goes on
    scale = tl.rsqrt(tl.sum(row * row, 0) / size + eps)
    told = row * scale * tl.load(weight + columns, mask=is_there, other=0.0).to(tl.float32)
    tl.store(normed + place, told.to(normed.dtype.element_ty), mask=is_there)


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_store(  # type: ignore[no-untyped-def]
    heads, row_stride, cos, sin, pool, slots,
    num_heads: tl.constexpr, kv_heads: tl.constexpr, half: tl.constexpr, padded: tl.constexpr, at_once: tl.constexpr,
):  # fmt: skip
    """Some heads of one row, whichever they are: queries, keys or values."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * at_once + tl.arange(0, at_once)
    columns = tl.arange(0, padded)
    is_half = columns < half
    is_there = (head < num_heads + 2 * kv_heads)[:, None] & is_half[None, :]
    is_query = (head < num_heads)[:, None]
    is_value = (head >= num_heads + kv_heads)[:, None]
    first = heads + row * row_stride + head[:, None] * (2 * half) + columns[None, :]
    ahead = tl.load(first, mask=is_there, other=0.0).to(tl.float32)
    behind = tl.load(first + half, mask=is_there, other=0.0).to(tl.float32)
    cosines = tl.load(cos + row * half + columns, mask=is_half, other=0.0).to(tl.float32)[None, :]
    sines = tl.load(sin + row * half + columns, mask=is_half, other=0.0).to(tl.float32)[None, :]
    turned_ahead = tl.where(is_value, ahead, ahead * cosines - behind * sines)
    turned_behind = tl.where(is_value, behind, behind * cosines + ahead * sines)
    tl.store(first, turned_ahead.to(heads.dtype.element_ty), mask=is_there & is_query)
    tl.store(first + half, turned_behind.to(heads.dtype.element_ty), mask=is_there & is_query)
    # A slot is K of all heads, then V of all of them: so keys and values go on as they come.
    held = pool + tl.load(slots + row) * (4 * kv_heads * half) + (head - num_heads)[:, None] * (2 * half)
    held += columns[None, :]
    tl.store(held, turned_ahead.to(pool.dtype.element_ty), mask=is_there & (head >= num_heads)[:, None])
    tl.store(held + half, turned_behind.to(pool.dtype.element_ty), mask=is_there & (head >= num_heads)[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _gate(gate_up, gated, size: tl.constexpr, at_once: tl.constexpr, is_gelu: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some numbers of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * at_once + tl.arange(0, at_once)
    is_there = columns < size
    x = tl.load(gate_up + row * 2 * size + columns, mask=is_there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + columns, mask=is_there, other=0.0).to(tl.float32)
    # GELU by tanh: half of 1 + tanh(a) is the sigmoid of 2 a.
    opened = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x)) if is_gelu else tl.sigmoid(x)
    tl.store(gated + row * size + columns, (x * opened * up).to(gated.dtype.element_ty), mask=is_there)
