"""How long an arm would have said what full depth says, had both answered greedily.

Full depth's answer is given to the arm token by token: up to the first one that it would have chosen otherwise, the two
answers are the same. One forward an arm and answer, and no decoding loop but full depth's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from shoal_lab.quality.answers import greedy_answers
from shoal_lab.quality.arms import Arm
from shoal_lab.quality.reading import Reading
from shoal_lab.quality.statistics import Bootstrap, Interval
from shoal_lab.quality.subject import Subject


@dataclass(frozen=True, slots=True)
class GreedyScore:
    """``prefix`` is the mean number of tokens that are the same from the start, of ``mean_tokens`` (an end token
    counts); ``whole`` the share of answers that are the same throughout. Full depth's own row isn't quite whole where
    two tokens are equally likely to rounding: its answers come from steps of other shapes.
    """

    treatment: str
    num_skipped: int
    num_answers: int
    mean_tokens: float
    prefix: Interval
    whole: Interval


def score_greedy(
    subject: Subject,
    arms: Sequence[Arm],
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    seed: int,
    on_progress: Callable[[int, int], None],
) -> list[GreedyScore]:
    """One score an arm. ``prompts`` with ``max_tokens`` more must fit the subject."""
    total = 2 * len(prompts)  # each is answered, then read
    answers = greedy_answers(
        subject, prompts, max_tokens=max_tokens, on_progress=lambda num_done: on_progress(num_done, total)
    )
    prefixes = np.empty((len(arms), len(prompts)))
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        reading = Reading(subject, (*prompt, *answer[:-1]), len(prompt), {arm.num_skipped for arm in arms})
        for row, arm in enumerate(arms):
            prefixes[row, index] = shared_prefix(reading.logits(arm).argmax(dim=-1).tolist(), answer)
        on_progress(len(prompts) + index + 1, total)
    lengths = np.array([len(answer) for answer in answers], dtype=np.float64)
    bootstrap = Bootstrap([len(prompts)], seed=seed)
    return [
        GreedyScore(
            arm.name, arm.num_skipped, len(prompts), float(lengths.mean()),
            bootstrap.mean(own), bootstrap.mean((own == lengths).astype(np.float64)),
        )
        for arm, own in zip(arms, prefixes, strict=True)
    ]  # fmt: skip


def shared_prefix(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens are the same from the start."""
    differing = (index for index, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
    return next(differing, len(theirs))
