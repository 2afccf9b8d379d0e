"""A clock that stands still until a test says otherwise."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable


class FakeTimer:
    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class FakeClock:
    """Time passes only in ``advance``, which calls what has become due, each at its own time."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self._due: list[tuple[float, int, FakeTimer]] = []
        self._order = itertools.count()

    def time(self) -> float:
        return self.now_s

    def call_at(self, when: float, callback: Callable[[], object], /) -> FakeTimer:
        timer = FakeTimer(callback)
        heapq.heappush(self._due, (when, next(self._order), timer))
        return timer

    async def advance(self, seconds: float) -> None:
        await settle()
        end_s = self.now_s + seconds
        while self._due and self._due[0][0] <= end_s:
            when, _, timer = heapq.heappop(self._due)
            self.now_s = max(self.now_s, when)
            if timer.callback is not None:
                timer.callback()
                await settle()
        self.now_s = end_s
        await settle()


async def settle() -> None:
    """Let all tasks run until they wait for something that only the test can bring (in memory, that is)."""
    for _ in range(50):
        await asyncio.sleep(0)
