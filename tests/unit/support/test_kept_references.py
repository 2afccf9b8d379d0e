"""The references that are kept are those that would be computed."""

from __future__ import annotations

import json

import pytest
from real_prompts import KEPT, MAX_EXCUSED_GAP, made_of, real_prompts, refer
from reference import Generated

# Of the 64 that are kept.
NUM_TOKENS = 16
AGAIN = "compute them anew: python tests/support/real_prompts.py"


def test_they_were_made_of_what_is_here():
    assert json.loads(KEPT.read_text(encoding="utf-8"))["made_of"] == made_of(), AGAIN


def test_twenty_prompts_of_all_lengths():
    lengths = sorted(len(prompt.token_ids) for prompt in real_prompts())
    assert len(lengths) == 20 and lengths[0] >= 20 and lengths[-1] <= 1500 and lengths[-4] > 1000


def _same(kept: Generated, new: Generated) -> bool:
    """Token by token, and by the same distance to the second best, nowhere so small that it could be either."""
    assert min(kept.gaps[:NUM_TOKENS]) >= MAX_EXCUSED_GAP
    return kept.token_ids[:NUM_TOKENS] == new.token_ids and kept.gaps[:NUM_TOKENS] == pytest.approx(
        new.gaps, rel=1e-2, abs=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "01-question",
        pytest.param("05-function", marks=pytest.mark.long),
        "09-recipe",
        pytest.param("13-code-review", marks=pytest.mark.long),
        "15-proof",
    ],
)
def test_computed_anew_they_are_the_same(name: str):
    [kept] = [prompt for prompt in real_prompts() if prompt.name == name]
    new = refer(name, NUM_TOKENS)
    assert kept.token_ids == new.token_ids, AGAIN
    assert _same(kept.full, new.full) and _same(kept.shallow, new.shallow), AGAIN
