"""The cores that work runs on: one's own, or a machine's that all of its processes share."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Protocol

from shoal.simulate.agenda import Agenda

# Work that is done but for the rounding of a float: a picosecond.
_ROUNDING_S = 1e-12


class Cores(Protocol):
    def run(self, width: int, work_s: float, done: Callable[[], None]) -> None:
        """Call ``done`` when ``work_s`` is over, which is what the work takes on ``width`` idle cores."""
        ...


class OwnCores:
    """Whoever runs here has no neighbours."""

    def __init__(self, agenda: Agenda) -> None:
        self._agenda = agenda

    def run(self, width: int, work_s: float, done: Callable[[], None]) -> None:
        self._agenda.after(work_s, done)


class SharedCores:
    """``num`` cores, shared fairly among threads, as an operating system does.

    Where more threads run than there are cores, each has ``num / threads`` of one, and all of them together get only
    ``efficiency`` of the cores' work done: caches and barriers suffer.
    As all threads advance at one speed, a job ends when that speed's integral has grown by its work.
    """

    def __init__(self, agenda: Agenda, num: int, efficiency: float) -> None:
        self._agenda, self._num, self._efficiency = agenda, num, efficiency
        self._jobs: list[tuple[float, int, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._num_threads = 0
        self._advanced_s = self._seen_s = 0.0
        self._alarm = 0
        self.busy_s = 0.0
        """Seconds in which any job ran."""

    @property
    def speed(self) -> float:
        """Of each job, where 1 is that of idle cores."""
        if self._num_threads <= self._num:
            return 1.0
        return self._efficiency * self._num / self._num_threads

    def run(self, width: int, work_s: float, done: Callable[[], None]) -> None:
        self._advance()
        heapq.heappush(self._jobs, (self._advanced_s + work_s, next(self._numbers), width, done))
        self._num_threads += width
        self._set_alarm()

    def _advance(self) -> None:
        passed_s = self._agenda.now_s - self._seen_s
        if self._jobs:
            self.busy_s += passed_s
        self._advanced_s += passed_s * self.speed
        self._seen_s = self._agenda.now_s

    def _set_alarm(self) -> None:
        """For the job that ends first; whenever the speed changes, the alarm before is void."""
        self._alarm += 1
        number = self._alarm
        if self._jobs:
            left_s = max(0.0, self._jobs[0][0] - self._advanced_s) / self.speed
            self._agenda.after(left_s, lambda: self._ring(number))

    def _ring(self, number: int) -> None:
        if number != self._alarm:
            return
        self._advance()
        ended: list[Callable[[], None]] = []
        while self._jobs and (self._jobs[0][0] <= self._advanced_s + _ROUNDING_S or not ended):
            _, _, width, done = heapq.heappop(self._jobs)
            self._num_threads -= width
            ended.append(done)
        self._set_alarm()
        for done in ended:
            done()
