from __future__ import annotations

import math

import pytest
import torch

from shoal.backends.chooser import SampleRow
from shoal.engine.sampler import sample
from shoal.wire.messages import SamplingParams, TokenLogprob
from shoal_lab.chaos.truth import TIE, Truth, gap_of, is_right

KNOWN = Truth((5, 6, 7), (1.0, TIE / 2, 1.0))


@pytest.mark.parametrize(
    ("token_ids", "is_complete", "agrees"),
    [
        ((5, 6, 7), True, True),
        ((5, 6), True, False),
        ((5, 6, 7, 8), True, False),
        ((5, 6), False, True),
        ((), False, True),
        ((5, 6, 7, 8), False, False),
        ((4, 6, 7), True, False),
        ((4,), False, False),
        ((5, 6, 4), False, False),
        # The second choice was a tie: whatever follows another one is another answer.
        ((5, 4, 9), True, True),
        ((5, 4), False, True),
    ],
)
def test_an_answer_is_right_if_it_differs_at_a_tie_alone(token_ids: tuple[int, ...], is_complete: bool, agrees: bool):
    assert KNOWN.agrees(token_ids, is_complete=is_complete) is agrees


def test_while_two_plans_are_served_each_ones_answer_is_right_and_no_mixture():
    other = Truth((5, 9, 9), (1.0, 1.0, 1.0))
    plain = Truth((5, 6, 7), (1.0, 1.0, 1.0))
    assert is_right((plain, other), (5, 9, 9), is_complete=True)
    assert not is_right((plain, other), (5, 6, 9), is_complete=True)


def told(logits: list[float], seed: int | None, index: int) -> TokenLogprob:
    """What the sampler says of a choice from ``logits``."""
    params = SamplingParams(
        1, temperature=0.0 if seed is None else 1.0, top_k=0 if seed is None else 2, seed=seed or 0, num_logprobs=3
    )
    [found] = sample(torch.tensor([logits]), [SampleRow(params, 0, index, 0)])
    return TokenLogprob(found.token_id, "", found.logprob or 0.0, tuple((id_, "", value) for id_, value in found.top))


def test_the_gap_of_a_greedy_choice_is_that_of_the_best_two():
    assert gap_of(told([0.0, 2.0, 1.5, -1.0], None, 0), None, 0) == pytest.approx(0.5)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("logits", [[0.3, -4.0, 0.0, -9.0], [-4.0, 0.0, 0.6, -9.0]])
def test_the_gap_of_a_draw_is_how_far_the_likeliest_may_move_until_another_token_comes(logits: list[float], seed: int):
    before = told(logits, seed, 3)
    gap = gap_of(before, seed, 3)
    assert gap < math.inf
    best = max(range(4), key=lambda i: logits[i])

    def after(change: float) -> int:
        return told([value + change * (i == best) for i, value in enumerate(logits)], seed, 3).token_id

    for change in (gap * 0.99, -gap * 0.99):
        assert after(change) == before.token_id
    if gap < 3:  # else it's the third that would come in
        assert before.token_id != after(gap * 1.01) or before.token_id != after(-gap * 1.01)
