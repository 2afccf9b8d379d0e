"""The sampler, held against a plain one written from the definitions, and against the distributions themselves."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.backends.chooser import SampleRow, uniform
from shoal.engine.sampler import sample
from shoal.errors import InternalError
from shoal.wire.messages import SamplingParams

VOCAB = 11
GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
FREE = SamplingParams(max_tokens=8, temperature=1.0, seed=7)
EXAMPLE = torch.tensor([0.3, 2.0, -1.0, 2.0, 0.0, -3.0, 1.2, 0.7, -0.2, 1.9, -5.0])


def random_logits(num_rows: int, num_tokens: int = VOCAB, seed: int = 0) -> Tensor:
    return 2 * torch.randn(num_rows, num_tokens, generator=torch.Generator().manual_seed(seed))


def choose(logits: Tensor, params: SamplingParams, num_draws: int) -> list[int]:
    """The first ``num_draws`` tokens of one choice, as if every step had these logits."""
    return [one.token_id for one in sample(logits[None], [SampleRow(params, 0, i, 0) for i in range(num_draws)])]


# --- oracle -----------------------------------------------------------------------------------------------


def plain_distribution(logits: list[float], params: SamplingParams, banned: set[int] = frozenset()) -> dict[int, float]:
    """Token id -> probability, after temperature, then top k, then top p."""
    scaled = {i: value / params.temperature for i, value in enumerate(logits) if i not in banned}
    if params.top_k:
        kth = sorted(scaled.values(), reverse=True)[: params.top_k][-1]
        scaled = {i: value for i, value in scaled.items() if value >= kth}
    kept = softmax(scaled)
    before = 0.0
    for i in sorted(kept, key=lambda i: (-kept[i], i)):
        if before >= params.top_p and before > 0:
            del scaled[i]
        before += kept[i]
    return softmax(scaled)


def softmax(scaled: dict[int, float]) -> dict[int, float]:
    peak = max(scaled.values())
    weights = {i: math.exp(value - peak) for i, value in scaled.items()}
    return {i: weight / sum(weights.values()) for i, weight in weights.items()}


def plain_draw(distribution: dict[int, float], at: float) -> int:
    total = 0.0
    for i in sorted(distribution):
        total += distribution[i]
        if at < total:
            return i
    raise AssertionError("rounding")


def plain_philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> int:
    """First word of Philox4x64-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3; SC 2011)."""
    (k0, k1), (c0, c1, c2, c3), mask = key, counter, 2**64 - 1
    for _ in range(10):
        one, two = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (two >> 64) ^ c1 ^ k0, two & mask, (one >> 64) ^ c3 ^ k1, one & mask
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return c0


OPTIONS = [
    FREE,
    replace(FREE, temperature=0.5),
    replace(FREE, temperature=3.0),
    replace(FREE, top_k=1),
    replace(FREE, top_k=4),
    replace(FREE, top_k=VOCAB),
    replace(FREE, top_k=10 * VOCAB),
    replace(FREE, top_p=0.9),
    replace(FREE, top_p=0.5),
    replace(FREE, temperature=2.0, top_k=6, top_p=0.8),
    replace(FREE, temperature=0.7, top_k=3, top_p=0.3),
]


@pytest.mark.parametrize("params", OPTIONS, ids=str)
def test_draws_are_those_of_the_plain_sampler(params: SamplingParams):
    logits = random_logits(40)
    rows = [SampleRow(params, choice, index, (7 * index + choice) % 40) for choice in range(4) for index in range(40)]
    expected = [
        plain_draw(plain_distribution(logits[row.row_index].tolist(), params), uniform(7, row.choice, row.index))
        for row in rows
    ]
    assert [one.token_id for one in sample(logits, rows)] == expected


@pytest.mark.parametrize("top_p", [0.1, 0.6, 0.95, 0.9999])
def test_top_p_of_many_tokens_with_equals_is_that_of_the_plain_sampler(top_p: float):
    logits = (3 * random_logits(12, 2000)).bfloat16()
    params = replace(FREE, top_p=top_p)
    expected = [plain_draw(plain_distribution(row.tolist(), params), uniform(7, 0, i)) for i, row in enumerate(logits)]
    assert [one.token_id for one in sample(logits, [SampleRow(params, 0, i, i) for i in range(12)])] == expected


def chi_square_limit(degrees: int, z: float = 3.09) -> float:
    """The 99.9 % quantile (Wilson and Hilferty)."""
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3 if degrees else 1e-9


@given(
    seed=st.integers(0, 2**32), temperature=st.floats(1e-3, 10), top_k=st.integers(0, 15), top_p=st.floats(0, 1),
    banned=st.sets(st.integers(0, VOCAB - 1), max_size=VOCAB - 1),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_a_draw_is_always_a_token_that_the_options_leave(
    seed: int, temperature: float, top_k: int, top_p: float, banned: set[int]
):
    params = replace(FREE, seed=seed, temperature=temperature, top_k=top_k, top_p=top_p)
    logits = random_logits(1, seed=seed)
    [one] = sample(logits, [SampleRow(params, 0, 0, 0, tuple(banned))])
    distribution = plain_distribution(logits[0].tolist(), params, banned)
    slack = plain_distribution(logits[0].tolist(), replace(params, top_p=min(1.0, top_p + 1e-9)), banned)
    assert one.token_id in set(distribution) | set(slack)


# --- greedy -----------------------------------------------------------------------------------------------


def test_greedy_takes_the_likeliest_and_of_equals_the_lowest_id():
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [9.0, 1.0, 9.0, 9.0], [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    assert [one.token_id for one in sample(logits, [SampleRow(GREEDY, 0, 0, i) for i in range(4)])] == [1, 0, 0, 3]


def test_float64_logits_are_not_rounded():
    logits = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert sample(logits, [SampleRow(GREEDY, 0, 0, 0)])[0].token_id == 1


def test_equals_of_the_kth_stay():
    logits = torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0])
    assert set(choose(logits, replace(FREE, top_k=2), 300)) == {0, 1, 2, 3}


def test_of_equals_top_p_keeps_the_lower_ids():
    assert set(choose(torch.zeros(10), replace(FREE, top_p=0.25), 300)) == {0, 1, 2}


# --- what a draw depends on --------------------------------------------------------------------------------


def mixed_rows() -> list[SampleRow]:
    options = [*OPTIONS, GREEDY, replace(GREEDY, num_logprobs=3), replace(FREE, num_logprobs=0, top_k=5)]
    banned = [(i % VOCAB,) if i % 4 == 0 else () for i in range(28)]
    return [SampleRow(options[i % len(options)], i % 3, 5 * i, i, banned[i]) for i in range(28)]


@pytest.mark.parametrize("num_tokens", [VOCAB, 3001])
def test_a_row_is_chosen_alike_alone_and_in_any_batch(num_tokens: int):
    logits, rows = random_logits(28, num_tokens), mixed_rows()
    together = sample(logits, rows)
    assert [sample(logits[row.row_index][None], [replace(row, row_index=0)])[0] for row in rows] == together
    turned = [replace(row, row_index=27 - row.row_index) for row in reversed(rows)]
    assert sample(logits.flip(0), turned) == together[::-1]


def test_the_same_seed_continues_identically_and_another_does_not():
    logits = torch.zeros(1000)
    whole = choose(logits, FREE, 40)
    resumed = sample(logits[None], [SampleRow(FREE, 0, index, 0) for index in range(25, 40)])
    assert [one.token_id for one in resumed] == whole[25:]
    assert choose(logits, replace(FREE, seed=8), 40) != whole


def test_choices_of_one_row_and_indices_are_independent():
    """Pairs of draws from a fair 8-sided die must fill all 64 cells evenly, whichever coordinate they differ in."""
    logits, num_draws = torch.zeros(1, 8), 3200
    for step in [(1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        ones, others = (
            sample(logits, [die(*((2 * i + moved) * axis for axis in step)) for i in range(num_draws)])
            for moved in (0, 1)
        )
        cells = Counter((one.token_id, other.token_id) for one, other in zip(ones, others, strict=True))
        statistic = sum((cells[a, b] - num_draws / 64) ** 2 / (num_draws / 64) for a in range(8) for b in range(8))
        assert statistic <= chi_square_limit(63)


def die(seed: int, choice: int, index: int) -> SampleRow:
    return SampleRow(replace(FREE, seed=seed), choice, index, 0)


SEEDS = [0, 1, 7, 2**31, 2**63 - 1, 2**64 - 1, -1, -(2**63)]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_uniform_is_philox_keyed_by_seed_and_choice_counted_by_index(seed: int):
    for choice, index in [(0, 0), (3, 0), (0, 5), (15, 131_071)]:
        word = plain_philox((seed % 2**64, choice), (1, index, 0, 0))
        assert uniform(seed, choice, index) == (word >> 11) / 2**53


def test_uniforms_are_pinned():
    """A change here would make a seed mean something else: resumed and repeated requests would differ."""
    pinned = [0.011546754286331562, 0.9668618045416987, 0.7308592267215347]
    assert [uniform(0, 0, 0), uniform(7, 1, 2), uniform(2**63 - 1, 0, 9)] == pinned


def test_the_plain_philox_gives_its_authors_known_answer():
    assert plain_philox((0, 0), (0, 0, 0, 0)) == 0x16554D9ECA36314C


# --- bans, log-probabilities, faults -----------------------------------------------------------------------


@pytest.mark.parametrize("params", [GREEDY, FREE, replace(FREE, top_k=1)], ids=["greedy", "free", "top_k"])
def test_a_banned_token_is_not_chosen_and_keeps_its_log_probability(params: SamplingParams):
    logits = torch.tensor([[1.0, 9.0, 2.0, 8.0]])
    for index in range(30):
        row = SampleRow(replace(params, num_logprobs=2), 0, index, 0, (1, 1, 3, -4, 99))
        [one] = sample(logits, [row])
        assert one.token_id in {0, 2}
        assert [token_id for token_id, _ in one.top] == [1, 3]
        assert one.logprob == pytest.approx(float(logits[0].log_softmax(-1)[one.token_id]))


def test_log_probabilities_are_of_the_unmodified_distribution():
    params = replace(FREE, temperature=0.2, top_k=2, num_logprobs=4)
    expected = softmax(dict(enumerate(EXAMPLE.tolist())))
    best = sorted(expected, key=lambda i: (-expected[i], i))[:4]
    for one in sample(EXAMPLE[None], [SampleRow(params, 0, index, 0) for index in range(20)]):
        assert [token_id for token_id, _ in one.top] == best
        assert [value for _, value in one.top] == pytest.approx([math.log(expected[i]) for i in best], abs=1e-5)
        assert one.logprob == pytest.approx(math.log(expected[one.token_id]), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("params", [GREEDY, FREE], ids=["greedy", "drawn"])
def test_logits_that_are_not_numbers_are_a_defect(value: float, params: SamplingParams, dtype: torch.dtype):
    logits = random_logits(3).to(dtype)
    logits[1, 4] = value
    with pytest.raises(InternalError, match="NaN or infinite"):
        sample(logits, [SampleRow(params, 0, 0, i) for i in range(3)])
    assert len(sample(logits, [SampleRow(params, 0, 0, 0), SampleRow(params, 0, 0, 2)])) == 2


def test_banning_all_tokens_is_a_defect():
    with pytest.raises(InternalError, match="banned"):
        sample(random_logits(1), [SampleRow(GREEDY, 0, 0, 0, tuple(range(VOCAB)))])


def test_bfloat16_says_what_the_same_numbers_in_float32_do():
    """Rows in any order, some twice, of a tensor that needn't lie in one piece; zeros of both signs are equal."""
    logits = random_logits(28, 2 * VOCAB, seed=3).to(torch.bfloat16)
    logits[:, 4:9] = 0.0
    logits[:, 6] = -0.0
    logits[1] = torch.full((2 * VOCAB,), -math.inf)
    logits[1, -3:] = -0.0
    for one in (logits, logits[:, ::2], logits.flip(0)):
        rows = mixed_rows()
        for order in (rows, rows[::-1], [*rows, *rows]):
            assert sample(one, order) == sample(one.float(), order)


@pytest.mark.parametrize("row_index", [-1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_is_not_there_is_an_error_and_not_another_s(row_index: int, dtype: torch.dtype):
    with pytest.raises(IndexError):
        sample(torch.randn(3, 11).to(dtype), [SampleRow(GREEDY, 0, 0, row_index)])
