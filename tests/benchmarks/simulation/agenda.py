"""Time as a list of what is to happen: the next event is taken, and it is that late."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

from shoal.errors import InternalError


class Agenda:
    """Seconds from 0. Events of the same moment happen in the order in which they were put down."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def now(self) -> float:
        return self.now_s

    def at(self, moment_s: float, event: Callable[[], None]) -> None:
        """Raises InternalError if that is over."""
        if moment_s < self.now_s:
            raise InternalError(f"an event at {moment_s} s was put down at {self.now_s} s")
        heapq.heappush(self._events, (moment_s, next(self._numbers), event))

    def after(self, delay_s: float, event: Callable[[], None]) -> None:
        self.at(self.now_s + delay_s, event)

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._events:
            self.now_s, _, event = heapq.heappop(self._events)
            event()
