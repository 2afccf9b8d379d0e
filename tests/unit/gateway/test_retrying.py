"""Who runs a request again, and who doesn't."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

import pytest

from shoal.config import RateConfig
from shoal.errors import DeadlineExceeded, Overloaded, PeerGone, ShoalError, Unavailable
from shoal.gateway.backend import Readiness
from shoal.gateway.retrying import RetryingBackend
from shoal.messages import Depth, GenerateRequest, RequestContext, SamplingParams, TokenOutput
from shoal.rate import RateLimit

REQUEST = GenerateRequest(
    RequestContext("one", timeout_s=10), "tiny", (1, 2, 3), Depth.SHALLOW, SamplingParams(max_tokens=2, seed=7)
)
OUTPUTS = [TokenOutput(0, (5,), "a"), TokenOutput(0, (6,), "b")]


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Pool:
    """Run ``i`` ends with ``failures[i]`` after ``num_before`` outputs and ``lasts_s``; a later one brings ``last``."""

    def __init__(
        self,
        *failures: ShoalError,
        num_before: int = 0,
        lasts_s: float = 1.0,
        last: Sequence[TokenOutput] = OUTPUTS,
    ) -> None:
        self.clock = Clock()
        self.requests: list[GenerateRequest] = []
        self.num_open = 0
        self._failures = list(failures)
        self._num_before = num_before
        self._lasts_s = lasts_s
        self._last = last

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        assert self.num_open == 0, "the one before isn't over"
        self.requests.append(request)
        self.num_open += 1
        try:
            self.clock.now_s += self._lasts_s
            failure = self._failures.pop(0) if self._failures else None
            for output in self._last if failure is None else OUTPUTS[: self._num_before]:
                yield output
            if failure is not None:
                raise failure
        finally:
            self.num_open -= 1

    async def readiness(self) -> Readiness:
        return Readiness(num_decode=2, num_prefill=1)


class Run:
    """What came of ``REQUEST``."""

    def __init__(self, pool: Pool, max_attempts: int = 3, rate: RateConfig | None = None) -> None:
        self.outputs: list[TokenOutput] = []
        self.retried: list[str] = []
        limit = RateLimit(rate or RateConfig(), pool.clock)
        self.backend = RetryingBackend(
            pool, max_attempts=max_attempts, limit=limit, retried=self.retried.append, clock=pool.clock
        )

    async def __call__(self, *, is_whole: bool = False) -> Run:
        async for output in self.backend.generate(replace(REQUEST, is_whole=is_whole)):
            self.outputs.append(output)
        return self


async def test_another_replica_takes_over_and_continues_alike():
    pool = Pool(PeerGone("died"))
    run = await Run(pool)()
    assert run.outputs == OUTPUTS and run.retried == ["peer_gone"]
    first, second = pool.requests
    assert second.sampling == first.sampling and second.prompt_token_ids == first.prompt_token_ids
    assert (first.context.attempt, second.context.attempt) == (1, 2)
    assert (first.context.timeout_s, second.context.timeout_s) == (10, 9)


async def test_after_the_first_output_the_error_stands():
    run = Run(pool := Pool(PeerGone("died"), num_before=1))
    with pytest.raises(PeerGone):
        await run()
    assert run.outputs == OUTPUTS[:1] and len(pool.requests) == 1 and not run.retried


@pytest.mark.parametrize("num_before", [1, 2])
async def test_a_whole_answer_goes_on_where_the_dead_replica_stopped(num_before: int):
    run = await Run(pool := Pool(PeerGone("died"), num_before=num_before))(is_whole=True)
    assert run.outputs == OUTPUTS and len(pool.requests) == 2 and run.retried == ["peer_gone"]


async def test_a_whole_answer_of_several_choices_goes_on_in_each():
    others = [replace(output, choice=1) for output in OUTPUTS]
    mixed = [OUTPUTS[0], others[0], others[1], OUTPUTS[1]]
    run = await Run(Pool(PeerGone("died"), num_before=1, last=mixed))(is_whole=True)
    assert run.outputs == mixed


async def test_a_whole_answer_is_never_made_of_two():
    other = [replace(OUTPUTS[0], token_ids=(9,)), OUTPUTS[1]]
    run = Run(pool := Pool(PeerGone("died"), num_before=1, last=other))
    with pytest.raises(PeerGone, match="another turn"):
        await run(is_whole=True)
    assert run.outputs == OUTPUTS[:1] and len(pool.requests) == 3


async def test_attempts_are_bounded():
    run = Run(pool := Pool(*(PeerGone("died") for _ in range(5))))
    with pytest.raises(PeerGone):
        await run()
    assert len(pool.requests) == 3 and run.retried == ["peer_gone"] * 2


@pytest.mark.parametrize("error", [Overloaded("full"), Unavailable("no rung left"), DeadlineExceeded("late")], ids=str)
async def test_an_answer_of_the_pool_is_not_asked_for_again(error: ShoalError):
    run = Run(pool := Pool(error))
    with pytest.raises(type(error)):
        await run()
    assert len(pool.requests) == 1


async def test_a_pool_that_dies_and_dies_is_left_alone_for_a_while():
    run = Run(pool := Pool(*(PeerGone("died") for _ in range(4))), rate=RateConfig(per_s=0.001, burst=1))
    with pytest.raises(PeerGone):
        await run()
    assert len(pool.requests) == 2


async def test_no_attempt_begins_after_the_deadline():
    run = Run(pool := Pool(PeerGone("died"), lasts_s=11))
    with pytest.raises(DeadlineExceeded):
        await run()
    assert len(pool.requests) == 1


async def test_leaving_closes_the_run_under_way():
    run = Run(pool := Pool(PeerGone("died")))
    outputs = run.backend.generate(REQUEST)
    assert await anext(outputs) == OUTPUTS[0] and pool.num_open == 1
    await outputs.aclose()
    assert pool.num_open == 0


async def test_readiness_is_the_pools():
    assert await Run(Pool()).backend.readiness() == Readiness(num_decode=2, num_prefill=1)
