"""Each kernel against the same in float64, on shapes that leave remainders everywhere."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from engines import torch_threads
from exact_attention import exact_attention

from shoal.backends.cpu.kernels import NativeKernels
from shoal.backends.cpu.layers import pointer
from shoal.errors import InternalError
from shoal.model.packed import PackedMatrix

# Outputs are rounded to bfloat16 (8 bits), and so are probabilities.
CLOSE = {"rtol": 1 / 64, "atol": 1 / 64}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@pytest.mark.parametrize("in_one_run", [True, False])
@pytest.mark.parametrize(
    ("rows", "context", "heads", "kv_heads", "head_dim", "window"),
    [
        (1, 1, 3, 1, 64, None),
        (7, 7, 9, 3, 64, None),
        (130, 1100, 9, 3, 64, None),
        (600, 600, 2, 2, 128, None),
        (33, 530, 4, 1, 256, None),
        (513, 1024, 3, 3, 64, 100),
        (64, 700, 4, 1, 256, 512),
        (5, 900, 2, 1, 64, 1),
    ],
)
def test_prompt_attention(
    kernels: NativeKernels,
    rows: int,
    context: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None,
    in_one_run: bool,
) -> None:
    queries = random(rows, heads + 2 * kv_heads, head_dim)[:, :heads]
    pool = random(1200, 2, kv_heads, head_dim)
    pool[0] = math.nan  # what nobody sees isn't read
    order = torch.randperm(1199, generator=torch.Generator().manual_seed(1))[:context] + 1
    slots = slice(17, 17 + context) if in_one_run else order
    position, key = torch.arange(context - rows, context)[:, None], torch.arange(context)
    seen = (key <= position) & (key > position - (window or context))
    out = torch.full((rows, heads, head_dim), math.nan, dtype=torch.bfloat16)
    kernels.attend_prompt(queries, pool, slots, context, window, 0.3, out)
    torch.testing.assert_close(out.double(), exact_attention(queries, pool[slots], seen, 0.3), **CLOSE)


@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("rise", [-0.5, 0.01, 0.5, 40.0])
def test_scores_that_rise_from_key_to_key(kernels: NativeKernels, rise: float, head_dim: int) -> None:
    """By less than is worth a new scale, and by more; or they only fall."""
    rows = 300
    queries, pool = torch.zeros(rows, 1, head_dim).bfloat16(), random(rows, 2, 1, head_dim)
    queries[:, 0, 0] = torch.linspace(0, 1, rows)  # each row's rise by as much as it is late
    pool[:, 0, 0, 0] = torch.arange(rows) * rise
    out = torch.empty_like(queries)
    kernels.attend_prompt(queries, pool, slice(0, rows), rows, None, 1.0, out)
    seen = torch.ones(rows, rows, dtype=torch.bool).tril()
    torch.testing.assert_close(out.double(), exact_attention(queries, pool, seen, 1.0), **CLOSE)


def test_prompt_attention_rounds_to_neither_side(kernels: NativeKernels) -> None:
    """Probabilities that were cut off instead would make all of it 0.2 % smaller, which no single number shows."""
    rows = 300
    queries, pool = random(rows, 1, 64), random(rows, 2, 1, 64)
    pool[:, 1] = pool[:, 1].sigmoid() + 1
    out = torch.empty_like(queries)
    kernels.attend_prompt(queries, pool, slice(0, rows), rows, None, 0.3, out)
    expected = exact_attention(queries, pool, torch.ones(rows, rows, dtype=torch.bool).tril(), 0.3)
    assert abs((out.double() / expected - 1).mean().item()) < 2e-4


@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("size", [4, 100])  # with large ones, later scores are often too large for their row's scale
@pytest.mark.parametrize("window", [None, 70])
def test_a_rows_attention_is_the_same_whichever_rows_are_beside_it(
    kernels: NativeKernels, window: int | None, size: int, head_dim: int
) -> None:
    """So is what chunks of another size make, or a prompt that begins with what was cached."""
    rows = 300
    queries, pool = size * random(rows, 2, head_dim), random(rows, 2, 1, head_dim)
    whole, parts = torch.empty_like(queries), torch.empty_like(queries)
    kernels.attend_prompt(queries, pool, slice(0, rows), rows, window, 1.0, whole)
    for begin, end in ((0, 37), (37, 38), (38, 203), (203, rows)):
        kernels.attend_prompt(queries[begin:end], pool, slice(0, end), end, window, 1.0, parts[begin:end])
    assert torch.equal(whole, parts)


@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "head_dim"),
    [
        ((1,), 9, 3, 64),
        ((1100,), 9, 3, 64),
        ((17, 900, 64, 65), 9, 3, 64),
        ((700, 3), 8, 2, 128),
        ((100,), 4, 1, 256),
        ((63, 65, 127, 129), 14, 2, 64),
        ((64, 1, 130), 5, 1, 128),
        ((129, 300), 8, 1, 256),
    ],
)
def test_decode_attention(
    kernels: NativeKernels, lengths: tuple[int, ...], heads: int, kv_heads: int, head_dim: int
) -> None:
    batch, longest = len(lengths), max(lengths)
    queries = random(batch + 2, heads + 2 * kv_heads, head_dim)[:, :heads]
    pool = random(1200, 2, kv_heads, head_dim)
    generator = torch.Generator().manual_seed(1)
    slots = torch.stack([torch.randperm(1200, generator=generator)[:longest] for _ in lengths])
    rows = torch.arange(batch, 0, -1)
    out = torch.full(queries.shape, math.nan, dtype=torch.bfloat16)
    kernels.attend_decode(queries, rows, pool, slots.reshape(-1), longest, torch.tensor(lengths), 0.3, out)
    for row, length, own in zip(rows.tolist(), lengths, slots, strict=True):
        seen = torch.ones(1, length, dtype=torch.bool)
        expected = exact_attention(queries[row : row + 1], pool[own[:length]], seen, 0.3)
        torch.testing.assert_close(out[row : row + 1].double(), expected, **CLOSE)
    assert out[[0, batch + 1]].isnan().all()  # not asked for, not touched


def test_however_a_context_is_cut_attention_is_almost_the_same(kernels: NativeKernels) -> None:
    """What is rounded doesn't depend on it, but for sums in another order."""
    queries, pool = random(1, 9, 64), random(1200, 2, 3, 64)
    outs = [torch.empty(1, 9, 64, dtype=torch.bfloat16) for _ in range(2)]
    for num_threads, out in zip((1, 8), outs, strict=True):
        with torch_threads(num_threads):
            kernels.attend_decode(
                queries, torch.tensor([0]), pool, torch.arange(1100), 1100, torch.tensor([1100]), 0.3, out
            )
    assert int((outs[0] != outs[1]).sum()) < 20  # of 576


def test_decode_attention_over_one_run_of_slots(kernels: NativeKernels) -> None:
    queries, pool, rows = random(2, 3, 64), random(600, 2, 1, 64), torch.arange(2)
    outs = [torch.empty(2, 3, 64, dtype=torch.bfloat16) for _ in range(2)]
    for context, out in zip((slice(5, 605), torch.arange(5, 605)), outs, strict=True):
        kernels.attend_decode(queries, rows, pool[:600], context, 290, torch.tensor([290, 280]), 0.125, out)
    assert torch.equal(*outs)


@pytest.mark.parametrize("size", [1e4, 1e12])
def test_scores_of_any_size_make_no_nan(kernels: NativeKernels, size: float) -> None:
    queries, pool = size * random(70, 1, 64), size * random(70, 2, 1, 64)
    out = torch.empty(70, 1, 64, dtype=torch.bfloat16)
    kernels.attend_prompt(queries, pool, slice(0, 70), 70, None, 1.0, out)
    expected = exact_attention(queries, pool, torch.ones(70, 70, dtype=torch.bool).tril(), 1.0)
    torch.testing.assert_close(out.double(), expected, rtol=1 / 64, atol=size / 64)


def test_a_power_that_is_no_longer_cut_where_it_should_be_is_noticed(kernels: NativeKernels) -> None:
    """Just below 2^27 its whole part is off by up to eight, and what is made of the rest may be less than nothing."""
    rows, late = 300, 70
    queries, pool = torch.zeros(rows, 1, 64).bfloat16(), random(rows, 2, 1, 64)
    pool[:, 0] = 0
    pool[late, 0, 0, :2] = 1
    queries[:, 0, 0] = 8.887e7
    queries[:, 0, 1] = 2e5 * random(rows)
    out = torch.empty_like(queries)
    kernels.attend_prompt(queries, pool, slice(0, rows), rows, None, 1.0, out)
    assert torch.equal(out[late:, 0], pool[late, 1].expand(rows - late, -1))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["query", "key", "value"])
def test_what_is_not_finite_stays_so(kernels: NativeKernels, what: str, broken: float) -> None:
    queries, pool = random(80, 1, 64).abs(), random(80, 2, 1, 64).abs()
    {"query": queries, "key": pool[:, 0], "value": pool[:, 1]}[what][3, 0, 5] = broken
    prompt, decode = torch.empty(80, 1, 64, dtype=torch.bfloat16), torch.empty(80, 1, 64, dtype=torch.bfloat16)
    kernels.attend_prompt(queries, pool, slice(0, 80), 80, None, 1.0, prompt)
    rows, slots = torch.tensor([3]), torch.arange(80)
    kernels.attend_decode(queries, rows, pool, slots, 80, torch.tensor([80]), 1.0, decode)
    assert not prompt[3].isfinite().all()
    assert not decode[3].isfinite().all()
    # Masked is a probability of 0, and 0 times a V that is broken is so, too: its sequence fails anyway.
    assert what == "value" or prompt[2].isfinite().all()


@pytest.mark.parametrize("rows", [1, 7, 50])
@pytest.mark.parametrize("size", [16, 576])
def test_add_norm(kernels: NativeKernels, rows: int, size: int) -> None:
    hidden, added, weight = random(rows, size), random(rows, size + 1)[:, :size].contiguous(), random(size)
    before = hidden.clone()
    total, normed = kernels.add_norm(hidden, added, weight, 1e-5)
    assert torch.equal(total, hidden + added)
    assert torch.equal(hidden, before)
    wide = total.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    torch.testing.assert_close(normed.double(), expected, **CLOSE)
    same, alone = kernels.add_norm(total, None, weight, 1e-5)
    assert same is total
    assert torch.equal(alone, normed)


@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.parametrize("is_gelu", [True, False])
def test_gate(kernels: NativeKernels, rows: int, is_gelu: bool) -> None:
    both = 8 * random(rows, 96)
    gate, up = both.double().chunk(2, dim=-1)
    expected = (F.gelu(gate, approximate="tanh") if is_gelu else F.silu(gate)) * up
    torch.testing.assert_close(kernels.gate(both, is_gelu=is_gelu).double(), expected, **CLOSE)


@pytest.mark.parametrize("rows", [1, 12, 13, 17, 33, 49, 100])
@pytest.mark.parametrize(("is_gelu", "has_bias"), [(True, False), (False, True)])
def test_gated_linear_is_the_gate_of_linear(kernels: NativeKernels, rows: int, is_gelu: bool, has_bias: bool) -> None:
    size, num_gated = 96, 224
    weight, inputs = random(2 * num_gated, size), random(rows, size) / 4
    bias = random(2 * num_gated) if has_bias else None
    packed = PackedMatrix.of(weight)
    expected = kernels.gate(kernels.linear(inputs, packed.values, 2 * num_gated, bias), is_gelu=is_gelu)
    assert torch.equal(kernels.gated_linear(inputs, packed.values, num_gated, bias, is_gelu=is_gelu), expected)
    with guarded(inputs) as own, guarded(packed.values) as panels:
        around = torch.full((rows + 2, num_gated), 7.0).bfloat16()
        kernels._call(
            "shoal_gated_linear", own.data_ptr(), panels.data_ptr(), pointer(bias), rows, num_gated, size, int(is_gelu),
            around[1:].data_ptr(), 2,
        )  # fmt: skip
    assert torch.equal(around[1:-1], expected)
    assert bool((around[[0, -1]] == 7).all())


def test_rows_of_a_packed_matrix(kernels: NativeKernels) -> None:
    weight = random(97, 64)
    packed, index = PackedMatrix.of(weight), torch.tensor([96, 0, 31, 32, 95, 31])
    assert torch.equal(kernels.packed_rows(packed.values, 97, index), weight[index])
    assert torch.equal(kernels.packed_rows(packed.values, 97, index), packed.rows(index))
    for outside in (-1, 97):
        with pytest.raises(InternalError, match="shoal_packed_rows"):
            kernels.packed_rows(packed.values, 97, torch.tensor([0, outside]))


@pytest.mark.parametrize("rows", [1, 50])
def test_rotate_and_store(kernels: NativeKernels, rows: int) -> None:
    heads, pool = random(rows, 3 + 2 * 2, 64), random(100, 2, 2, 64)
    angles = torch.rand(rows, 32, generator=torch.Generator().manual_seed(0)) * 6
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    slots = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:rows]
    wide, untouched = heads.double(), pool.clone()
    first, second = wide[:, :5].chunk(2, dim=-1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    rotated = torch.cat([first * c - second * s, second * c + first * s], dim=-1)
    kernels.rotate_store(heads, 3, cos, sin, pool, slots)
    torch.testing.assert_close(heads[:, :3].double(), rotated[:, :3], **CLOSE)
    torch.testing.assert_close(pool[slots, 0].double(), rotated[:, 3:], **CLOSE)
    assert torch.equal(pool[slots, 1].double(), wide[:, 5:])
    others = torch.ones(100, dtype=torch.bool).index_fill_(0, slots, False)
    assert torch.equal(pool[others], untouched[others])


@pytest.mark.parametrize("rows", [1, 65, 511])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(3, 64), (1, 128), (2, 256), (2, 32), (1, 96)])
@pytest.mark.parametrize("is_listed", [True, False])
def test_projected_heads_are_those_of_one_kernel_after_the_other(
    kernels: NativeKernels, rows: int, kv_heads: int, head_dim: int, is_listed: bool
) -> None:
    """Three layers' keys and values, each to its own pool by its own angles: bit by bit, and nothing beside them."""
    layers, size = 3, 96
    outputs = layers * 2 * kv_heads * head_dim
    inputs, bias, panels = random(rows, size), random(outputs), PackedMatrix.of(random(outputs, size)).values
    turns = [torch.rand(rows, head_dim // 2, generator=torch.Generator().manual_seed(seed)) * 6 for seed in (1, 2, 3)]
    angles = [(each.cos().bfloat16(), each.sin().bfloat16()) for each in turns]
    slots = torch.randperm(600, generator=torch.Generator().manual_seed(0))[:rows] if is_listed else None
    found, expected = ([random(600, 2, kv_heads, head_dim).add_(layer) for layer in range(layers)] for _ in range(2))
    heads = kernels.linear(inputs, panels, outputs, bias).view(rows, layers, 2 * kv_heads, head_dim)
    for layer, (cos, sin) in enumerate(angles):
        kernels.rotate_store(heads[:, layer], 0, cos, sin, expected[layer], slots)
    kernels.project(inputs, panels, bias, found, angles, slots)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_shapes_that_they_cannot_take(kernels: NativeKernels) -> None:
    with pytest.raises(InternalError, match="shoal_gate"):
        kernels.gate(random(2, 20), is_gelu=False)
    with pytest.raises(InternalError, match="shoal_linear"):
        kernels.linear(random(65, 48), random(1, 24, 32, 2), 32, None)
    with pytest.raises(InternalError, match="shoal_gated_linear"):
        kernels.gated_linear(random(20, 32), random(3, 16, 32, 2), 48, None, is_gelu=False)
    angles = [(random(70, 24), random(70, 24))]
    for size, head_dim in ((32, 48), (48, 64)):
        inputs, panels, pools = random(70, size), random(4, size // 2, 32, 2), [random(70, 2, 1, head_dim)]
        with pytest.raises(InternalError, match="shoal_project"):
            kernels.project(inputs, panels, None, pools, angles, None)


@pytest.mark.parametrize("rows", [1, 2, 8, 12, 13, 16, 17, 32, 33, 49, 65, 511])
@pytest.mark.parametrize(("outputs", "size"), [(1, 32), (1024 + 97, 576), (48, 96)])
def test_linear(kernels: NativeKernels, rows: int, outputs: int, size: int) -> None:
    inputs, weight, bias = random(rows, size), random(outputs, size), random(outputs)
    panels, expected = PackedMatrix.of(weight).values, F.linear(inputs.double(), weight.double())
    torch.testing.assert_close(kernels.linear(inputs, panels, outputs, None).double(), expected, **CLOSE)
    found = kernels.linear(inputs, panels, outputs, bias)
    torch.testing.assert_close(found.double(), expected + bias.double(), **CLOSE)


@pytest.mark.parametrize(
    ("rows", "outputs", "size"), [(1100, 97, 1600), (2049, 33, 288), (70, 160, 4128), (100, 640, 2080)]
)
def test_rows_by_the_thousand_are_as_each_of_them_among_few(
    kernels: NativeKernels, rows: int, outputs: int, size: int
) -> None:
    """More rows than the second cache holds, or more inputs: a chunk at a time, by several panels."""
    inputs, panels = random(rows, size), PackedMatrix.of(random(outputs, size)).values
    found = kernels.linear(inputs, panels, outputs, None)
    for begin in (0, rows // 2, rows - 40):
        some = slice(begin, begin + 40)
        assert torch.equal(found[some], kernels.linear(inputs[some], panels, outputs, None))


@pytest.mark.parametrize("threads", [1, 3, 5])
@pytest.mark.parametrize(("rows", "outputs"), [(1300, 97), (70, 97), (200, 577)])
def test_many_rows_whoever_shares_them(kernels: NativeKernels, rows: int, outputs: int, threads: int) -> None:
    """Of more threads than cores some come late, and others have begun with what they would have; of few rows there are
    fewer blocks than threads."""
    size = 576
    inputs, panels = random(rows, size), PackedMatrix.of(random(outputs, size)).values
    found = torch.full((rows, outputs), 7.0).bfloat16()
    kernels._call(
        "shoal_linear", inputs.data_ptr(), panels.data_ptr(), None, rows, outputs, size, found.data_ptr(), threads
    )
    assert torch.equal(found, kernels.linear(inputs, panels, outputs, None))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("rows", "gated", "size"), [(70, 96, 960), (1100, 96, 960), (80, 320, 2080)])
def test_gates_of_many_rows(kernels: NativeKernels, rows: int, gated: int, size: int, threads: int) -> None:
    inputs, panels = random(rows, size) / 4, PackedMatrix.of(random(2 * gated, size) / 8).values
    expected = kernels.gate(kernels.linear(inputs, panels, 2 * gated, None), is_gelu=False)
    found = torch.empty_like(expected)
    kernels._call(
        "shoal_gated_linear",
        inputs.data_ptr(),
        panels.data_ptr(),
        None,
        rows,
        gated,
        size,
        0,
        found.data_ptr(),
        threads,
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("rows", [1, 12, 13, 40, 200])
@pytest.mark.parametrize(("outputs", "size"), [(32, 96), (112, 160), (97, 160)])
def test_products_write_their_own_rows_and_read_no_more(
    kernels: NativeKernels, rows: int, outputs: int, size: int
) -> None:
    """A page that nobody may touch follows what they read, and a pattern is around what they write."""
    weight, inputs = random(outputs, size), random(rows, size)
    packed = PackedMatrix.of(weight)
    with guarded(inputs) as own, guarded(packed.values) as panels:
        around = torch.full((rows + 2, outputs), 7.0).bfloat16()
        kernels._call(
            "shoal_linear", own.data_ptr(), panels.data_ptr(), None, rows, outputs, size, around[1:].data_ptr(), 2
        )
    torch.testing.assert_close(around[1:-1].double(), F.linear(inputs.double(), weight.double()), **CLOSE)
    assert bool((around[[0, -1]] == 7).all())


@contextmanager
def guarded(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The same numbers, at the end of a page after which reading is a crash."""
    num_bytes, page = tensor.nbytes, mmap.PAGESIZE
    room = -(-num_bytes // page) * page
    memory = mmap.mmap(-1, room + page)
    held = torch.frombuffer(memory, dtype=tensor.dtype)
    last = ctypes.c_void_p(held.data_ptr() + room)
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    assert mprotect(last, ctypes.c_size_t(page), 0) == 0
    copied = held[(room - num_bytes) // tensor.itemsize : room // tensor.itemsize].view(tensor.shape)
    copied.copy_(tensor)
    yield copied
    assert mprotect(last, ctypes.c_size_t(page), mmap.PROT_READ | mmap.PROT_WRITE) == 0


@pytest.mark.parametrize("rows", [2, 40, 100])
def test_a_row_that_is_not_finite_is_its_own(kernels: NativeKernels, rows: int) -> None:
    inputs, panels = random(rows, 64), PackedMatrix.of(random(96, 64)).values
    expected = kernels.linear(inputs, panels, 96, None)
    inputs[1, 3] = math.inf
    found = kernels.linear(inputs, panels, 96, None)
    assert not found[1].isfinite().any()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[2:], expected[2:])


def test_torch_finds_the_tiles_as_it_left_them(kernels: NativeKernels) -> None:
    """Its products set shapes of their own, and remember what they have set."""
    inputs, weight = random(200, 40), random(72, 40)
    queries, pool = random(90, 3, 64), random(90, 2, 1, 64)
    expected = F.linear(inputs, weight)
    for _ in range(3):
        kernels.attend_prompt(queries, pool, slice(0, 90), 90, None, 0.125, torch.empty_like(queries))
        assert torch.equal(F.linear(inputs, weight), expected)
        kernels.linear(random(20, 64), PackedMatrix.of(random(64, 64)).values, 64, None)
        assert torch.equal(F.linear(inputs, weight), expected)
