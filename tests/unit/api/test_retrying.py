"""Who runs a request again, and who doesn't."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace

import pytest
from null_observer import NullObserver

from shoal.api.backend import Readiness, Route
from shoal.api.retrying import AGAIN_S, LOOK_S, PATIENCE_S, RetryingBackend
from shoal.config import RateConfig, ShoalConfig
from shoal.config.rate import RateLimit
from shoal.errors import DeadlineExceeded, Overloaded, PeerGone, PlanMismatch, ShoalError, Unavailable
from shoal.wire.messages import (  # fmt: skip
    Depth,
    FinishReason,
    GenerateRequest,
    HandoffReport,
    RequestContext,
    Resumption,
    SamplingParams,
    SentChoice,
    TokenOutput,
)
from shoal.wire.options import HANDOFF_MAX_MESSAGE_BYTES
from shoal.wire.requests import from_submit, to_submit
from shoal.wire.values import MAX_ID

REQUEST = GenerateRequest(
    RequestContext("one", timeout_s=10), "tiny", (1, 2, 3), Depth.SHALLOW, SamplingParams(max_tokens=2, seed=7)
)
REPORT = HandoffReport(Depth.SHALLOW, transferred=True, plan_hash="pop")
OUTPUTS = [
    TokenOutput(0, (5,), "a", handoff=REPORT),
    TokenOutput(0, (6,), "b", finish_reason=FinishReason.LENGTH),
]


def mixed() -> list[TokenOutput]:
    """Two choices, of which the second is done first."""
    others = [replace(output, choice=1, handoff=None) for output in OUTPUTS]
    return [OUTPUTS[0], others[0], others[1], OUTPUTS[1]]


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, time_s: float) -> None:
        assert time_s > 0
        self.now_s += time_s


class Pool:
    """Run ``i`` takes ``lasts_s`` and ends with ``failures[i]``, the first of them after ``num_before`` outputs; each
    goes on where those before have stopped. It goes to the first replica that it doesn't exclude, or the first of all;
    ``lives(now_s)`` are those that there are."""

    def __init__(
        self,
        *failures: ShoalError,
        num_before: int = 0,
        lasts_s: float = 1.0,
        outputs: Sequence[TokenOutput] = OUTPUTS,
        lives: Callable[[float], str] = lambda _now_s: "abc",
    ) -> None:
        self.clock = Clock()
        self.lives = lives
        self.asked: list[tuple[str, float]] = []
        """Each run's replica, and when it began."""
        self.requests: list[GenerateRequest] = []
        self.num_open = 0
        self._failures = list(failures)
        self._num_before = num_before
        self._lasts_s = lasts_s
        self._outputs = list(outputs)

    async def living(self) -> frozenset[str]:
        return frozenset(self.lives(self.clock.now_s))

    async def generate(self, request: GenerateRequest, route: Route) -> AsyncGenerator[TokenOutput, None]:
        assert self.num_open == 0, "the one before isn't over"
        names = self.lives(self.clock.now_s)
        if not names:
            raise Unavailable("nobody is there")
        route.replica_id = min(set(names) - route.excluded or names)
        self.asked.append((route.replica_id, self.clock.now_s))
        self.requests.append(request)
        self.num_open += 1
        try:
            self.clock.now_s += self._lasts_s
            failure = self._failures.pop(0) if self._failures else None
            num_now, self._num_before = len(self._outputs) if failure is None else self._num_before, 0
            now, self._outputs = self._outputs[:num_now], self._outputs[num_now:]
            for output in now:
                yield output
            if failure is not None:
                raise failure
        finally:
            self.num_open -= 1

    async def readiness(self) -> Readiness:
        return Readiness(num_decode=2, num_prefill=1)


class Observer(NullObserver):
    def __init__(self) -> None:
        self.retries: list[str] = []
        self.num_resumes = 0

    def retried(self, reason: str) -> None:
        self.retries.append(reason)

    def resumed(self) -> None:
        self.num_resumes += 1


class Run:
    """What came of a request."""

    def __init__(
        self, pool: Pool, *, max_attempts: int = 3, rate: RateConfig | None = None, resumes: bool = True
    ) -> None:
        self.outputs: list[TokenOutput] = []
        self.seen = Observer()
        limit = RateLimit(rate or RateConfig(), pool.clock)
        self.backend = RetryingBackend(
            pool,
            max_attempts=max_attempts,
            limit=limit,
            observer=self.seen,
            resumes=resumes,
            clock=pool.clock,
            sleep=pool.clock.sleep,
        )

    async def __call__(self, request: GenerateRequest = REQUEST) -> Run:
        async for output in self.backend.generate(request):
            self.outputs.append(output)
        return self


async def test_another_replica_takes_over_from_the_beginning_if_nothing_came():
    pool = Pool(PeerGone("died"))
    run = await Run(pool)()
    assert run.outputs == OUTPUTS and run.seen.retries == ["peer_gone"] and run.seen.num_resumes == 0
    first, second = pool.requests
    assert second == replace(first, context=replace(first.context, attempt=2, timeout_s=9))
    assert (first.context.attempt, first.context.timeout_s) == (1, 10)


async def test_another_replica_goes_on_where_the_answer_stopped():
    run = await Run(pool := Pool(PeerGone("died"), num_before=1))()
    assert run.outputs == OUTPUTS and run.seen.retries == ["peer_gone"] and run.seen.num_resumes == 1
    first, second = pool.requests
    assert first.resumption is None and second.resumption == Resumption("pop", (SentChoice((5,)),))
    assert second.sampling == first.sampling and second.prompt_token_ids == first.prompt_token_ids


async def test_each_choice_goes_on_where_it_stopped():
    request = replace(REQUEST, sampling=replace(REQUEST.sampling, num_choices=2))
    for num_before, sent in [
        (1, (SentChoice((5,)), SentChoice())),
        (2, (SentChoice((5,)), SentChoice((5,)))),
        (3, (SentChoice((5,)), SentChoice(is_complete=True))),
    ]:
        run = await Run(pool := Pool(PeerGone("died"), num_before=num_before, outputs=mixed()))(request)
        assert run.outputs == mixed()
        assert pool.requests[1].resumption == Resumption("pop", sent)


async def test_long_choices_that_are_complete_fit_into_the_next_message():
    """Together they have more tokens than one message holds."""
    num_long, num_tokens = 8, 100_000
    first, last = OUTPUTS
    long = [replace(last, choice=index, token_ids=(MAX_ID,) * num_tokens) for index in range(1, 1 + num_long)]
    outputs = [first, *long, last]
    assert num_long * num_tokens * 5 > HANDOFF_MAX_MESSAGE_BYTES
    sampling = replace(REQUEST.sampling, num_choices=1 + num_long, max_tokens=num_tokens)
    run = await Run(pool := Pool(PeerGone("died"), num_before=1 + num_long, outputs=outputs))(
        replace(REQUEST, sampling=sampling)
    )
    assert run.outputs == outputs
    arrived = from_submit(to_submit(b"g" * 16, 7, b"s" * 16, pool.requests[1]))
    assert arrived.resumption == Resumption("pop", (SentChoice((5,)), *[SentChoice(is_complete=True)] * num_long))


async def test_it_goes_on_from_the_last_of_several():
    outputs = [OUTPUTS[0], TokenOutput(0, (7,), "c"), OUTPUTS[1]]
    pool = Pool(PeerGone("died"), PeerGone("died"), num_before=1, outputs=outputs)
    run = await Run(pool)()
    assert run.outputs == outputs and run.seen.num_resumes == 2
    assert [request.resumption for request in pool.requests] == [None, *[Resumption("pop", (SentChoice((5,)),))] * 2]


async def test_what_is_told_of_a_prompt_is_told_once():
    request = replace(REQUEST, sampling=replace(REQUEST.sampling, num_prompt_logprobs=2))
    for num_before, expected in ((0, 2), (1, None)):
        await Run(pool := Pool(PeerGone("died"), num_before=num_before))(request)
        assert pool.requests[1].sampling.num_prompt_logprobs == expected


@pytest.mark.parametrize("num_before", [0, 1])
async def test_no_run_goes_to_a_replica_that_has_failed_if_another_is_there(num_before: int):
    run = await Run(pool := Pool(PeerGone("died"), PlanMismatch("new"), num_before=num_before))()
    assert run.outputs == OUTPUTS and run.seen.retries == ["peer_gone", "plan_mismatch"]
    assert pool.asked == [("a", 0), ("b", 1), ("c", 2)], "each at once"
    assert pool.requests[1].resumption == pool.requests[2].resumption


async def test_one_that_is_alone_is_asked_again_after_a_while():
    pool = Pool(PeerGone("its connection broke"), PeerGone("again"), lives=lambda _now_s: "a")
    assert (await Run(pool)()).outputs == OUTPUTS
    assert pool.asked == [("a", 0), ("a", 1 + AGAIN_S), ("a", 2 * (1 + AGAIN_S))]


async def test_another_that_comes_meanwhile_is_taken_at_once():
    comes_s = 1 + AGAIN_S / 2
    pool = Pool(PeerGone("hangs"), lives=lambda now_s: "a" if now_s < comes_s else "ab")
    assert (await Run(pool)()).outputs == OUTPUTS
    [_, (name, asked_s)] = pool.asked
    assert name == "b" and comes_s <= asked_s < comes_s + LOOK_S


async def test_where_nobody_is_left_the_next_one_is_waited_for():
    comes_s = PATIENCE_S  # longer than one that is there is left alone for
    pool = Pool(PeerGone("died"), num_before=1, lives=lambda now_s: "a" if not now_s else "b" * (now_s >= comes_s))
    run = await Run(pool)()
    assert run.outputs == OUTPUTS and [name for name, _ in pool.asked] == ["a", "b"]
    assert pool.requests[1].context.timeout_s == REQUEST.context.timeout_s - pool.asked[1][1]


async def test_a_pool_that_stays_empty_is_not_waited_for_any_longer():
    run = Run(pool := Pool(PeerGone("died"), lives=lambda now_s: "a" if not now_s else ""))
    with pytest.raises(Unavailable, match="nobody"):
        await run()
    assert pool.clock.now_s == 1 + PATIENCE_S


async def test_nobody_is_waited_for_beyond_the_deadline():
    run = Run(pool := Pool(PeerGone("died"), lasts_s=9, lives=lambda now_s: "a" if not now_s else ""))
    with pytest.raises(DeadlineExceeded):
        await run()
    assert pool.clock.now_s == REQUEST.context.timeout_s


async def test_of_a_complete_answer_nothing_is_asked_for():
    run = await Run(pool := Pool(PeerGone("its end was lost"), num_before=2))()
    assert run.outputs == OUTPUTS and len(pool.requests) == 1 and not run.seen.retries


async def test_a_resume_that_cannot_be_sent_ends_the_answer():
    run = Run(pool := Pool(PeerGone("died"), Unavailable("too many tokens"), num_before=1))
    with pytest.raises(Unavailable, match="too many tokens"):
        await run()
    assert run.outputs == OUTPUTS[:1] and len(pool.requests) == 2


async def test_where_answers_are_not_resumed_the_error_stands_after_the_first_output():
    run = Run(pool := Pool(PeerGone("died"), num_before=1), resumes=False)
    with pytest.raises(PeerGone):
        await run()
    assert run.outputs == OUTPUTS[:1] and len(pool.requests) == 1 and not run.seen.retries
    run = await Run(Pool(PeerGone("died")), resumes=False)()
    assert run.outputs == OUTPUTS and run.seen.retries == ["peer_gone"]


async def test_attempts_are_bounded():
    run = Run(pool := Pool(*(PeerGone("died") for _ in range(5))))
    with pytest.raises(PeerGone):
        await run()
    assert len(pool.requests) == 3 and run.seen.retries == ["peer_gone"] * 2


async def test_what_one_has_no_room_for_another_one_is_asked_for():
    run = await Run(pool := Pool(Overloaded("full")), rate=RateConfig(per_s=0.001, burst=1))()
    assert run.outputs == OUTPUTS and run.seen.retries == ["overloaded"]
    assert pool.asked == [("a", 0.0), ("b", 1.0)]
    # Neither of its attempts nor of those that all have together: nothing was tried.
    assert [one.context.attempt for one in pool.requests] == [1, 1]
    assert [one.context.timeout_s for one in pool.requests] == [10, 9]


async def test_what_two_have_no_room_for_is_refused():
    run = Run(pool := Pool(*(Overloaded("full", retry_after_s=3.0) for _ in range(3))))
    with pytest.raises(Overloaded) as refused:
        await run()
    assert len(pool.requests) == 2 and refused.value.retry_after_s == 3.0


async def test_where_nobody_else_is_it_is_refused_at_once():
    run = Run(pool := Pool(Overloaded("full"), lives=lambda _now_s: "a"))
    with pytest.raises(Overloaded):
        await run()
    assert len(pool.requests) == 1 and pool.clock.now_s == 1.0 and run.seen.retries == []


async def test_an_answer_that_has_begun_goes_on_where_there_is_room():
    run = await Run(pool := Pool(PeerGone("died"), Overloaded("full"), num_before=1))()
    assert run.outputs == OUTPUTS and run.seen.retries == ["peer_gone", "overloaded"]
    assert [name for name, _ in pool.asked] == ["a", "b", "c"] and pool.requests[2].resumption is not None


@pytest.mark.parametrize("error", [Unavailable("no rung left"), DeadlineExceeded("late")], ids=str)
async def test_an_answer_of_the_pool_is_not_asked_for_again(error: ShoalError):
    run = Run(pool := Pool(error))
    with pytest.raises(type(error)):
        await run()
    assert len(pool.requests) == 1


async def test_a_pool_that_dies_and_dies_is_left_alone_for_a_while():
    run = Run(pool := Pool(*(PeerGone("died") for _ in range(4))), rate=RateConfig(per_s=0.001, burst=1))
    with pytest.raises(PeerGone):
        await run()
    assert len(pool.requests) == 2 and pool.clock.now_s == 2, "its turn would come after its deadline"


async def test_who_comes_too_often_waits_for_its_turn_and_loses_nothing():
    pool = Pool(PeerGone("died"), PeerGone("died"), num_before=1)
    run = await Run(pool, rate=RateConfig(per_s=0.25, burst=1))()
    assert run.outputs == OUTPUTS and run.seen.retries == ["peer_gone"] * 2
    assert pool.asked == [("a", 0), ("b", 1), ("c", 5)]
    assert pool.requests[2].context.timeout_s == REQUEST.context.timeout_s - 5


async def test_all_that_a_full_replica_has_when_it_dies_go_on_at_once():
    config, pool = ShoalConfig(), Pool()
    limit = RateLimit(config.gateway.retry, pool.clock)
    num_lost = config.decode.max_sequences + config.decode.max_queued
    assert {limit.book(within_s=0) for _ in range(num_lost)} == {0}


@pytest.mark.parametrize("error", [PeerGone("died"), Overloaded("full")], ids=str)
async def test_no_attempt_begins_after_the_deadline(error: ShoalError):
    run = Run(pool := Pool(error, lasts_s=11))
    with pytest.raises(DeadlineExceeded):
        await run()
    assert len(pool.requests) == 1


async def test_leaving_closes_the_run_under_way():
    run = Run(pool := Pool(PeerGone("died")))
    outputs = run.backend.generate(REQUEST)
    assert await anext(outputs) == OUTPUTS[0] and pool.num_open == 1
    await outputs.aclose()
    assert pool.num_open == 0
