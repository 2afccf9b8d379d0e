"""Single rows over the paged pool by Triton: what each mixes, and of what it may see alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact_attention import exact_attention
from triton_kernels import DEVICE, loaded

pytestmark = pytest.mark.triton

# The interpreter's products of bfloat16 aren't numbers.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
MOST_OFF = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
LONGEST = 600
LENGTHS = (LONGEST, 1, 256, 257)


@pytest.fixture(scope="module")
def kernel() -> Any:
    return loaded("paged_attention")


class Case:
    """Four sequences of a pool of six, whose rows come in another order, beside queries that aren't asked for. What
    nobody may see is no number."""

    def __init__(
        self, num_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, *, kv_dtype: torch.dtype | None = None
    ) -> None:
        chance = torch.Generator().manual_seed(num_heads * head_dim)
        count = len(LENGTHS)
        # As they come of one product with K and V.
        heads = torch.randn(count + 2, num_heads + 2 * kv_heads, head_dim, generator=chance)
        self.queries = heads.to(dtype).to(DEVICE)[:, :num_heads]
        self.rows = torch.tensor([5, 0, 3, 2], device=DEVICE)
        self.kv = torch.full((count * LONGEST + 1, 2, kv_heads, head_dim), float("nan"), dtype=kv_dtype or dtype)
        self.context = torch.full((count, LONGEST), count * LONGEST)  # the padding, which isn't to be read
        slots = torch.randperm(count * LONGEST, generator=chance)
        for index, length in enumerate(LENGTHS):
            mine, slots = slots[:length], slots[length:]
            self.context[index, :length] = mine
            self.kv[mine] = torch.randn(length, 2, kv_heads, head_dim, generator=chance).to(self.kv.dtype)
        self.kv, self.context = self.kv.to(DEVICE), self.context.to(DEVICE)
        self.lengths = torch.tensor(LENGTHS, device=DEVICE)

    def mixed(self, kernel: Any, context: torch.Tensor | slice | None = None, **options: Any) -> torch.Tensor:
        mixed = torch.full(self.queries.shape, 9.0, dtype=self.queries.dtype, device=DEVICE)
        seen = self.context.reshape(-1) if context is None else context
        kernel.attend_rows(self.queries, self.rows, self.kv, seen, LONGEST, self.lengths, mixed, scale=0.1, **options)
        assert (mixed[[1, 4]] == 9).all(), "rows that nobody asked for"
        return mixed[self.rows].double().cpu()

    def exactly(self, softcap: float | None = None) -> torch.Tensor:
        wanted = []
        for index, length in enumerate(LENGTHS):
            kv = self.kv[self.context[index, :length]].to(self.queries.dtype).cpu()
            query = self.queries[self.rows[index]][None].cpu()
            wanted.append(exact_attention(query, kv, torch.ones(1, length, dtype=torch.bool), 0.1, softcap)[0])
        return torch.stack(wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "kv_heads", "head_dim"), [(6, 2, 64), (2, 2, 80), (3, 1, 128), (2, 1, 20), (2, 1, 256), (20, 1, 16)]
)
@pytest.mark.parametrize("softcap", [None, 0.5, 50.0])
def test_each_row_mixes_what_it_may_see(
    kernel: Any, num_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, softcap: float | None
) -> None:
    case = Case(num_heads, kv_heads, head_dim, dtype)
    assert kernel.takes(case.queries, case.kv)
    found = case.mixed(kernel, softcap=softcap)
    assert (found - case.exactly(softcap)).abs().max() < MOST_OFF[dtype]


@pytest.mark.parametrize("num_processors", [1, 3, 1000])
def test_in_however_many_parts(kernel: Any, num_processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_num_processors", lambda _: num_processors)
    monkeypatch.setattr(kernel, "_LEAST_PART_TOKENS", 40)
    case = Case(2, 1, 64, torch.float32)
    parts = kernel._num_parts(len(LENGTHS), LONGEST, num_processors)
    assert parts == {1: 1, 3: 3, 1000: 15}[num_processors]
    assert (case.mixed(kernel) - case.exactly()).abs().max() < MOST_OFF[torch.float32]


def test_contexts_in_one_run_are_read_without_an_index(kernel: Any) -> None:
    case = Case(6, 2, 64, torch.float32)
    run = torch.full((7 + len(LENGTHS) * LONGEST, *case.kv.shape[1:]), float("nan"), device=DEVICE)
    for index, length in enumerate(LENGTHS):
        run[7 + index * LONGEST :][:length] = case.kv[case.context[index, :length]]
    wanted = case.exactly()
    case.kv = run
    found = case.mixed(kernel, slice(7, 7 + len(LENGTHS) * LONGEST))
    assert (found - wanted).abs().max() < MOST_OFF[torch.float32]


def test_kv_of_another_dtype_are_multiplied_in_that_of_queries(kernel: Any) -> None:
    case = Case(6, 2, 64, torch.float32, kv_dtype=torch.float16)
    assert (case.mixed(kernel) - case.exactly()).abs().max() < MOST_OFF[torch.float32]
