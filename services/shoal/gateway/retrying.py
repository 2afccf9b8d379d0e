"""A request whose decode replica died is run again by another one, as long as the client has seen nothing of it.

Seed and sampling are fixed, so another run brings the same tokens. What a whole answer had already is compared with
them and not given out twice; a stream, whose client has read it, ends with the error instead.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
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
    """``backend``, and again if it raises PeerGone before the client has seen anything.

    At most ``max_attempts`` runs, no more often than ``limit`` allows over all requests; what a replica that died had
    tried of the same budget nobody knows, so each run counts as one attempt. ``retried`` is told the code of each error
    that another run follows.
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
        given = _Given()
        while True:
            try:
                async with aclosing(self._backend.generate(request)) as outputs:
                    async for output in outputs:
                        if given.is_new(output):
                            yield output
                return
            except PeerGone as error:
                is_seen = given.is_any and not request.is_whole
                if is_seen or request.context.attempt >= self._max_attempts or not self._limit.take():
                    raise
                self._retried(error.code)
                _log.warning("another decode replica takes over", attempt=request.context.attempt, code=error.code)
                request = _next_attempt(request, deadline_s - self._clock())
                given.begin_again()

    async def readiness(self) -> Readiness:
        return await self._backend.readiness()


class _Given:
    """The tokens of each output that was given out, by choice, and how many of them the run under way has repeated."""

    def __init__(self) -> None:
        self._outputs: defaultdict[int, list[tuple[int, ...]]] = defaultdict(list)
        self._num_repeated: Counter[int] = Counter()

    @property
    def is_any(self) -> bool:
        return bool(self._outputs)

    def begin_again(self) -> None:
        self._num_repeated.clear()

    def is_new(self, output: TokenOutput) -> bool:
        """Whether no run before has brought it. Raises PeerGone where this run says something else than that one."""
        known, index = self._outputs[output.choice], self._num_repeated[output.choice]
        self._num_repeated[output.choice] += 1
        if index == len(known):
            known.append(output.token_ids)
            return True
        if known[index] != output.token_ids:
            raise PeerGone("a decode replica went away, and another run took another turn: ask again")
        return False


def _next_attempt(request: GenerateRequest, timeout_s: float) -> GenerateRequest:
    if timeout_s <= 0:
        raise DeadlineExceeded("the request's deadline has passed")
    context = request.context
    return replace(request, context=replace(context, attempt=context.attempt + 1, timeout_s=timeout_s))
