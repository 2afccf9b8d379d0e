"""Work that ends, wherever it waits, when something else has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from shoal.errors import ShoalError


class Cutoff:
    """``why`` makes the error that what is within ends with. Belongs to one event loop."""

    def __init__(self, why: Callable[[], ShoalError]) -> None:
        self.is_cut = False
        self._why = why
        self._within: set[asyncio.Timeout] = set()

    def cut(self) -> None:
        """End all that is within, and what comes later at once. Twice is a no-op."""
        self.is_cut = True
        while self._within:
            self._within.pop().reschedule(asyncio.get_running_loop().time())

    @asynccontextmanager
    async def within(self) -> AsyncIterator[None]:
        if self.is_cut:
            raise self._why()
        try:
            async with asyncio.timeout(None) as work:
                self._within.add(work)
                try:
                    yield
                finally:
                    self._within.discard(work)
        except TimeoutError as error:
            if not work.expired():
                raise
            raise self._why() from error
