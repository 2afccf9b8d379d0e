"""The cores that work runs on: one's own, or a machine's that all of its processes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from simulation.agenda import Agenda

# Work that is done but for the rounding of a float: a picosecond.
_ROUNDING_S = 1e-12
# What Linux gives a thread that is one nicer than others, of what it would have got (sched(7)).
_OF_ONE_NICER = 1 / 1.25


class Cores(Protocol):
    def run(self, width: int, work_s: float, done: Callable[[], None], *, niceness: int = 0) -> None:
        """Call ``done`` when ``work_s`` is over, which is what the work takes on ``width`` idle cores."""
        ...


class OwnCores:
    """Whoever runs here has no neighbours."""

    def __init__(self, agenda: Agenda) -> None:
        self._agenda = agenda

    def run(self, width: int, work_s: float, done: Callable[[], None], *, niceness: int = 0) -> None:
        self._agenda.after(work_s, done)


@dataclass(eq=False, slots=True)
class _Job:
    width: int
    weight: float
    left_s: float
    done: Callable[[], None]
    speed: float = 1.0
    """Where 1 is that of idle cores."""


class SharedCores:
    """``num`` cores, shared among threads as Linux does: by their niceness.

    Where more threads run than there are cores, all of them together get only ``efficiency`` of the cores' work done:
    caches and barriers suffer; above 1, one computes while another waits for memory.
    """

    def __init__(self, agenda: Agenda, num: int, efficiency: float) -> None:
        self._agenda, self._num, self._efficiency = agenda, num, efficiency
        self._jobs: list[_Job] = []
        self._seen_s = 0.0
        self._alarm = 0

    def run(self, width: int, work_s: float, done: Callable[[], None], *, niceness: int = 0) -> None:
        self._advance()
        self._jobs.append(_Job(width, _OF_ONE_NICER**niceness, work_s, done))
        self._share_out()

    def _advance(self) -> None:
        passed_s = self._agenda.now_s - self._seen_s
        for job in self._jobs:
            job.left_s -= passed_s * job.speed
        self._seen_s = self._agenda.now_s

    def _share_out(self) -> None:
        """Whenever a job comes or ends: each one's speed from now on, and an alarm for the next end, which voids the
        one before."""
        is_short = sum(job.width for job in self._jobs) > self._num
        of_cores = shares([(job.width, job.weight) for job in self._jobs], self._num)
        for job, share in zip(self._jobs, of_cores, strict=True):
            job.speed = min(1.0, share * self._efficiency) if is_short else 1.0
        self._alarm += 1
        number = self._alarm
        if self._jobs:
            left_s = min(max(0.0, job.left_s) / job.speed for job in self._jobs)
            self._agenda.after(left_s, lambda: self._ring(number))

    def _ring(self, number: int) -> None:
        if number != self._alarm:
            return
        self._advance()
        least_s = max(_ROUNDING_S, min(job.left_s for job in self._jobs))  # somebody ends, however floats are rounded
        ended = [job for job in self._jobs if job.left_s <= least_s]
        self._jobs = [job for job in self._jobs if job.left_s > least_s]
        self._share_out()
        for job in ended:
            job.done()


def shares(threads: Sequence[tuple[int, float]], num_cores: int) -> list[float]:
    """What a thread of each of these (how many, of what weight) gets of a core: in proportion to its weight, but no
    thread can use more than one, and others have what it leaves."""
    left, weights = float(num_cores), sum(num * weight for num, weight in threads)
    found = [0.0] * len(threads)
    for index in sorted(range(len(threads)), key=lambda index: -threads[index][1]):
        num, weight = threads[index]
        found[index] = min(1.0, left * weight / weights)
        left -= num * found[index]
        weights -= num * weight
    return found
