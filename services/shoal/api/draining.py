"""Shutting down without breaking answers off: what is open may finish for a while, what is new is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from shoal.api.backend import Backend, Readiness
from shoal.errors import Unavailable
from shoal.process.cutoff import Cutoff
from shoal.wire.messages import GenerateRequest, TokenOutput

_CUT_WITHIN_S = 1.0


class DrainingBackend:
    """``backend``, until ``drain``. Belongs to one event loop."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._num_open = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._cutoff = Cutoff(_shutting_down)
        self._is_draining = False

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        """As the backend's; raises Unavailable once the drain began, and in the midst of an answer once it's over."""
        if self._is_draining:
            raise _shutting_down()
        self._num_open += 1
        self._idle.clear()
        try:
            async with aclosing(self._backend.generate(request)) as outputs:
                while True:
                    async with self._cutoff.within():
                        output = await anext(outputs, None)
                    if output is None:
                        return
                    yield output
        finally:
            self._num_open -= 1
            if not self._num_open:
                self._idle.set()

    async def readiness(self) -> Readiness:
        return Readiness(num_decode=0, num_prefill=0) if self._is_draining else await self._backend.readiness()

    async def drain(self, timeout_s: float) -> None:
        """Returns when nothing is open any more: what isn't finished after ``timeout_s`` ends with Unavailable.

        Or a second later: an answer whose client has stopped reading doesn't end.
        """
        self._is_draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            await self._cut()

    async def _cut(self) -> None:
        self._cutoff.cut()
        with suppress(TimeoutError):
            async with asyncio.timeout(_CUT_WITHIN_S):
                await self._idle.wait()


def _shutting_down() -> Unavailable:
    return Unavailable("the server is shutting down: ask again in a moment, or another one", retry_after_s=1.0)
