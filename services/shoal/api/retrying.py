"""A request whose decode replica died goes to another one, which goes on where the answer stopped.

The other one recomputes the prompt at the depth it had and the tokens sent at full depth; seed and counter of each draw
are fixed, so that the answer is what it would have been. Where answers aren't resumed, one of which some was given out
ends with the error instead.

::

    a run fails ─> another one is there ──────────────────────────────────> the next run, at once
                   only those are that failed ──────────> AGAIN_S later ──> the next run, at one of them
                   none is ─> until one is, PATIENCE_S at most ───────────> the next run
    one is full ─> another one is there, and only one was asked ──────────> it's asked, at once

Without the wait, one replica that fails all that it's asked would be asked for all attempts within a moment: it looks
like the one that has the least to do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace

import structlog

from shoal.api.backend import DecodePool, GatewayObserver, Readiness, Route
from shoal.config.rate import RateLimit
from shoal.errors import DeadlineExceeded, Overloaded, PeerGone, PlanMismatch
from shoal.wire.messages import GenerateRequest, Resumption, SentChoice, TokenOutput

AGAIN_S = 1.0
"""When one that failed is asked again, if there is no other."""
PATIENCE_S = 5.0
"""How long a pool may be empty. Who waited for longer should come again."""
LOOK_S = 0.25
MAX_REFUSALS = 2
"""What one replica has no room for, another one may have; if that hasn't either, all are full."""
_log = structlog.get_logger(__name__)


class RetryingBackend:
    """``pool``, and again if it raises PeerGone; after some output only if it ``resumes``.

    At most ``max_attempts`` runs, no more often than ``limit`` allows over all requests: a run waits for its turn,
    unless that came after its deadline. What a replica that died had tried of the same budget nobody knows, so each run
    counts as one attempt. To be refused is none.
    """

    def __init__(
        self,
        pool: DecodePool,
        *,
        max_attempts: int,
        limit: RateLimit,
        observer: GatewayObserver,
        resumes: bool = True,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._pool = pool
        self._max_attempts = max_attempts
        self._limit = limit
        self._observer = observer
        self._resumes = resumes
        self._clock = clock
        self._sleep = sleep

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        """As the pool's; raises its last error once nothing is left to try."""
        deadline_s = self._clock() + request.context.timeout_s
        given = _Given(request.sampling.num_choices)
        failed: frozenset[str] = frozenset()
        num_refusals = 0
        while True:
            route = Route(failed)
            try:
                async with aclosing(self._pool.generate(request, route)) as outputs:
                    async for output in outputs:
                        given.note(output)
                        yield output
                return
            except Overloaded as error:
                failed |= route.replicas
                num_refusals += 1
                if num_refusals == MAX_REFUSALS or not await self._pool.living() - failed:
                    raise
                self._observer.retried(error.code)
                request = in_time(request, deadline_s - self._clock())
                continue
            except (PeerGone, PlanMismatch) as error:  # the latter where old and new replicas are mixed
                if given.is_complete:
                    return
                if given.is_any and not self._resumes:
                    raise
                if request.context.attempt >= self._max_attempts or not await self._wait_for_turn(deadline_s):
                    raise
                self._observer.retried(error.code)
                _log.warning("another decode replica takes over", attempt=request.context.attempt, code=error.code)
            failed |= route.replicas
            await self._wait_for_another(failed, deadline_s)
            request = _next_attempt(request, deadline_s - self._clock())
            if given.is_any:
                self._observer.resumed()
                request = given.resuming(request)

    async def readiness(self) -> Readiness:
        return await self._pool.readiness()

    async def _wait_for_turn(self, deadline_s: float) -> bool:
        """Until ``limit`` allows one more run; False, and at once, if that's beyond ``deadline_s``."""
        wait_s = self._limit.book(within_s=max(0.0, deadline_s - self._clock()))
        if wait_s:
            await self._sleep(wait_s)
        return wait_s is not None

    async def _wait_for_another(self, failed: frozenset[str], deadline_s: float) -> None:
        """Until there is one that hasn't ``failed``, or one that has may be asked again; not beyond ``deadline_s``."""
        began_s = now_s = self._clock()
        while not (living := await self._pool.living()) - failed:
            left_s = min(deadline_s, began_s + (AGAIN_S if living else PATIENCE_S)) - now_s
            if left_s <= 0:
                return
            await self._sleep(min(LOOK_S, left_s))
            now_s = self._clock()


class _Given:
    """What was given out of a request's answer, and by which plan."""

    def __init__(self, num_choices: int) -> None:
        self._num_choices = num_choices
        self._open: dict[int, list[int]] = {index: [] for index in range(num_choices)}
        self._plan_hash = ""
        self.is_any = False

    @property
    def is_complete(self) -> bool:
        return not self._open

    def note(self, output: TokenOutput) -> None:
        self.is_any = True
        if output.finish_reason is None:
            self._open[output.choice] += output.token_ids
        else:
            del self._open[output.choice]
        if output.handoff is not None:
            self._plan_hash = output.handoff.plan_hash

    def resuming(self, request: GenerateRequest) -> GenerateRequest:
        """``request`` without what it has already. What is told of a prompt came with the first output."""
        choices = tuple(
            SentChoice(tuple(self._open[index])) if index in self._open else SentChoice(is_complete=True)
            for index in range(self._num_choices)
        )
        return replace(
            request,
            sampling=replace(request.sampling, num_prompt_logprobs=None),
            resumption=Resumption(self._plan_hash, choices),
        )


def _next_attempt(request: GenerateRequest, timeout_s: float) -> GenerateRequest:
    request = in_time(request, timeout_s)
    return replace(request, context=replace(request.context, attempt=request.context.attempt + 1))


def in_time(request: GenerateRequest, timeout_s: float) -> GenerateRequest:
    """``request`` with so much time left."""
    if timeout_s <= 0:
        raise DeadlineExceeded("the request's deadline has passed")
    return replace(request, context=replace(request.context, timeout_s=timeout_s))
