"""A question that many ask at once and often, put to somebody who shouldn't hear it that often."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")

BELIEVED_S = 1.0


class SharedPoll(Generic[T]):
    """What ``ask`` answers: whoever wants to know within ``BELIEVED_S`` of its being asked shares one answer, or error.

    Belongs to one event loop. ``clock`` is monotonic seconds.
    """

    def __init__(self, ask: Callable[[], Awaitable[T]], clock: Callable[[], float] = time.monotonic) -> None:
        self._ask = ask
        self._clock = clock
        self._asked_s = -math.inf
        self._asking: asyncio.Future[T] | None = None

    async def answer(self) -> T:
        """At most ``BELIEVED_S`` old. Cancelling one who waits for it leaves the others theirs."""
        now_s = self._clock()
        if self._asking is None or (self._asking.done() and now_s - self._asked_s >= BELIEVED_S):
            self._asked_s = now_s
            self._asking = asyncio.ensure_future(self._ask())
        return await asyncio.shield(self._asking)
