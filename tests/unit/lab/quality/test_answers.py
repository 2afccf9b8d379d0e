"""What is asked of answers: greedy ones as the reference gives them, how long two agree, and facts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import save_tiny, tiny_llama
from reference import full_generate, pop_generate

from shoal.model.files import locate
from shoal_lab.quality.answers import greedy_answers
from shoal_lab.quality.arms import FULL, Arm
from shoal_lab.quality.greedy_scores import score_greedy, shared_prefix
from shoal_lab.quality.retrieval import RetrievalCase
from shoal_lab.quality.retrieval_scores import score_retrieval
from shoal_lab.quality.subject import Subject, Treatment

SKIPPED, NUM_TOKENS = 3, 12
SHALLOW = Arm("shallow", SKIPPED, Treatment.SHALLOW)


def ignore(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Subject]:
    folder: Path = tmp_path_factory.mktemp("tiny")
    model = save_tiny(folder, tiny_llama(seed=1)[1])
    return model, Subject.load(locate(str(folder)), dtype=torch.float64, max_tokens=64)


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    """More than run at once, of several lengths."""
    rng = np.random.default_rng(0)
    return [tuple(rng.integers(2, 97, 12 + 3 * index).tolist()) for index in range(11)]


def test_greedy_answers_are_the_reference_s(tiny, prompts):
    model, subject = tiny
    full = greedy_answers(subject, prompts, max_tokens=NUM_TOKENS)
    for index, prompt in enumerate(prompts):
        assert full[index] == full_generate(model, prompt, NUM_TOKENS, eos_token_ids=(1,)).token_ids


def test_the_shared_prefix_is_that_of_two_answers_decoded_apart(tiny, prompts):
    model, subject = tiny
    full, shallow = score_greedy(
        subject, [FULL, SHALLOW], prompts, max_tokens=NUM_TOKENS, seed=0, on_progress=ignore
    )  # fmt: skip
    shared = []
    for prompt in prompts:
        theirs = full_generate(model, prompt, NUM_TOKENS, eos_token_ids=(1,)).token_ids
        ours = pop_generate(model, prompt, len(theirs), SKIPPED).token_ids
        shared.append(shared_prefix(ours, theirs))
    assert 0 < np.mean(shared) < NUM_TOKENS
    assert shallow.prefix.value == pytest.approx(np.mean(shared))
    assert (full.prefix.value, full.whole.value) == pytest.approx((full.mean_tokens, 1.0))


def cases(model: Any, prompts: list[tuple[int, ...]], lengths: dict[int, bool]) -> list[RetrievalCase]:
    """In each cell full depth is always right, or never."""
    made = []
    for length, is_right in lengths.items():
        for prompt in prompts:
            answer = full_generate(model, prompt, 3).token_ids
            made.append(RetrievalCase(length, 0.5, prompt, answer if is_right else (*answer[:2], (answer[2] + 1) % 97)))
    return made


def test_facts_are_found_as_greedy_outputs_find_them_in_cells_that_others_chose(tiny, prompts):
    model, subject = tiny
    measured = cases(model, prompts, {100: True, 200: False, 300: True})
    choosing = cases(model, prompts[:2], {100: True, 200: True, 300: False})
    full, shallow = score_retrieval(
        subject, [FULL, SHALLOW], measured, choosing, seed=0, on_progress=ignore
    )  # fmt: skip
    rights = [case.is_right(pop_generate(model, case.prompt, 3, SKIPPED).token_ids) for case in measured]
    per_cell = [float(np.mean(rights[first : first + 11])) for first in (0, 11, 22)]
    assert [(cell.length, cell.num_cases, cell.counts) for cell in shallow.cells] == [
        (100, 11, True), (200, 11, True), (300, 11, False),
    ]  # fmt: skip
    assert [cell.right for cell in shallow.cells] == pytest.approx(per_cell)
    assert 0 < per_cell[0] < 1
    assert [cell.right for cell in full.cells] == [1, 0, 1]
    assert full.right is not None and shallow.right is not None and shallow.difference is not None
    assert full.right.value == 0.5 and full.num_cases == 22
    assert shallow.right.value == pytest.approx((per_cell[0] + per_cell[1]) / 2)
    assert shallow.difference.value == pytest.approx(shallow.right.value - 0.5)
    assert shallow.difference.low <= shallow.difference.value <= shallow.difference.high
    # Full depth has no spread within a cell, and which cell a case is of is no chance.
    assert full.right.low == full.right.high == 0.5


def test_where_full_depth_finds_nothing_no_share_is_told(tiny, prompts):
    model, subject = tiny
    wrong = cases(model, prompts[:3], {100: False})
    found = score_retrieval(subject, [FULL, SHALLOW], wrong, wrong, seed=0, on_progress=ignore)
    assert [(score.right, score.difference, score.num_cases) for score in found] == [(None, None, 0)] * 2
