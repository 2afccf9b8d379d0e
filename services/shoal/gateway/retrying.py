"""A request whose decode replica died is run again by another one, as long as the client has seen nothing of it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

import structlog

from shoal.errors import DeadlineExceeded, PeerGone
from shoal.gateway.backend import Backend, Readiness
from shoal.messages import GenerateRequest, TokenOutput
from shoal.rate import RateLimit

_log = structlog.get_logger(__name__)


class RetryingBackend:
    """``backend``, and again if it raises PeerGone before the first output.

    At most ``max_attempts`` in all, no more often than ``limit`` allows over all requests. ``retried`` is told the
    code of each error that another attempt follows. The seed is fixed, so the second run continues like the first.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        max_attempts: int,
        limit: RateLimit,
        retried: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend = backend
        self._max_attempts = max_attempts
        self._limit = limit
        self._retried = retried
        self._clock = clock

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        """As the backend's; raises its last error once nothing is left to try, or something was sent already."""
        deadline_s = self._clock() + request.context.timeout_s
        while True:
            had_output = False
            try:
                async with aclosing(self._backend.generate(request)) as outputs:
                    async for output in outputs:
                        had_output = True
                        yield output
                return
            except PeerGone as error:
                if had_output or request.context.attempt >= self._max_attempts or not self._limit.take():
                    raise
                self._retried(error.code)
                _log.warning("another decode replica takes over", attempt=request.context.attempt, code=error.code)
                request = _next_attempt(request, deadline_s - self._clock())

    async def readiness(self) -> Readiness:
        return await self._backend.readiness()


def _next_attempt(request: GenerateRequest, timeout_s: float) -> GenerateRequest:
    if timeout_s <= 0:
        raise DeadlineExceeded("the request's deadline has passed")
    context = request.context
    return replace(request, context=replace(context, attempt=context.attempt + 1, timeout_s=timeout_s))
