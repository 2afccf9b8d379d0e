"""How often each arm finds a fact in its prompt (retrieval.py), cell by cell and where full depth finds it at all.

A cell counts where full depth is right at least half of the time: below that, the model itself is what fails. Which
cells those are is told by cases of their own, or full depth would be judged by the luck that chose them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from shoal_lab.quality.arms import FULL, Arm
from shoal_lab.quality.reading import Reading
from shoal_lab.quality.retrieval import RetrievalCase
from shoal_lab.quality.statistics import Bootstrap, Interval
from shoal_lab.quality.subject import Subject

_MIN_RIGHT_TO_COUNT = 0.5


@dataclass(frozen=True, slots=True)
class CellRate:
    """The share of right answers of prompts of one length (tokens, at most) whose fact stands at one depth (0 to 1)."""

    length: int
    depth: float
    num_cases: int
    right: float
    counts: bool


@dataclass(frozen=True, slots=True)
class RetrievalScore:
    """``right`` is the share of right answers over the cells that count, ``difference`` that share less full depth's,
    paired case by case; both ``None`` where no cell counts."""

    treatment: str
    num_skipped: int
    cells: tuple[CellRate, ...]
    right: Interval | None
    difference: Interval | None

    @property
    def num_cases(self) -> int:
        """Those that count."""
        return sum(cell.num_cases for cell in self.cells if cell.counts)


def score_retrieval(
    subject: Subject,
    arms: Sequence[Arm],
    cases: Sequence[RetrievalCase],
    choosing: Sequence[RetrievalCase],
    *,
    seed: int,
    on_progress: Callable[[int, int], None],
) -> list[RetrievalScore]:
    """One score an arm, full depth's first. ``choosing`` are full depth's alone, of another seed and the same cells."""
    total = len(cases) + len(choosing)

    def measured(arms: Sequence[Arm], cases: Sequence[RetrievalCase], num_before: int) -> NDArray[np.float64]:
        rights = np.empty((len(arms), len(cases)))
        for index, case in enumerate(cases):
            rights[:, index] = right_answers(subject, arms, case)
            on_progress(num_before + index + 1, total)
        return rights

    [chosen_by] = measured([FULL], choosing, 0)
    rights = measured(arms, cases, len(choosing))
    cells = sorted({_cell(case) for case in cases})
    members = {cell: np.array([_cell(case) == cell for case in cases]) for cell in cells}
    counting = [
        cell for cell in cells
        if chosen_by[[_cell(case) == cell for case in choosing]].mean() >= _MIN_RIGHT_TO_COUNT
    ]  # fmt: skip
    # Case after case of one cell, then of the next: the strata of the bootstrap.
    order = np.concatenate([np.flatnonzero(members[cell]) for cell in counting] or [np.empty(0, dtype=np.intp)])
    bootstrap = Bootstrap([int(members[cell].sum()) for cell in counting], seed=seed) if counting else None
    return [
        RetrievalScore(
            arm.name, arm.num_skipped,
            tuple(
                CellRate(*cell, int(members[cell].sum()), float(own[members[cell]].mean()), cell in counting)
                for cell in cells
            ),
            None if bootstrap is None else bootstrap.mean(own[order]),
            None if bootstrap is None else bootstrap.difference(own[order], rights[0, order]),
        )
        for arm, own in zip(arms, rights, strict=True)
    ]  # fmt: skip


def right_answers(subject: Subject, arms: Sequence[Arm], case: RetrievalCase) -> list[bool]:
    """Whether each arm's greedy output would begin with the answer: each token of it is the likeliest after those
    before it."""
    reading = Reading(subject, case.prompt + case.answer[:-1], len(case.prompt), {arm.num_skipped for arm in arms})
    answer = torch.tensor(case.answer)
    return [torch.equal(reading.logits(arm).argmax(dim=-1).cpu(), answer) for arm in arms]


def _cell(case: RetrievalCase) -> tuple[int, float]:
    return case.length, case.depth
