from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import pytest
from fake_inference import WORDS, FakeInference, serving

from shoal.errors import Overloaded, PeerGone
from shoal_lab.chaos.cases import draw_cases
from shoal_lab.chaos.load import End, Load, loading
from shoal_lab.chaos.truth import Truth

STREAMED, WHOLE = (
    replace(draw_cases(1, 97, 0)[0], name=str(streamed), is_streamed=streamed) for streamed in (True, False)
)
RIGHT = Truth(tuple(range(len(WORDS))), (1.0,) * len(WORDS))
OTHER = Truth((0, 9, 9), (1.0,) * 3)


@asynccontextmanager
async def one_lane(service: FakeInference, truth: Truth = RIGHT, deadline_s: float = 30.0) -> AsyncIterator[Load]:
    """A load that asks nothing by itself."""
    truths = {case.name: (truth,) for case in (STREAMED, WHOLE)}
    with serving(service) as target:
        async with loading(target, [STREAMED], truths, num_in_flight=0, deadline_s=deadline_s) as load:
            yield load


@pytest.mark.parametrize("case", [STREAMED, WHOLE])
async def test_the_right_tokens_are_correct_and_others_wrong(case):
    async with one_lane(FakeInference()) as load:
        assert (await load.ask(case)).end is End.CORRECT
    async with one_lane(FakeInference(), OTHER) as load:
        assert (await load.ask(case)).end is End.WRONG


async def test_an_error_of_the_server_is_clear_unless_a_token_before_it_was_wrong():
    service = FakeInference(num_words=2, last_failure=PeerGone("decode went away", retry_after_s=1.5))
    async with one_lane(service) as load:
        outcome = await load.ask(STREAMED)
    assert outcome.end is End.ERROR and outcome.error is not None
    assert (outcome.error.code, outcome.error.retry_after_s) == ("peer_gone", 1.5)
    async with one_lane(service, OTHER) as load:
        assert (await load.ask(STREAMED)).end is End.WRONG


async def test_an_answer_that_ends_too_early_without_an_error_is_wrong():
    async with one_lane(FakeInference(num_words=2)) as load:
        assert (await load.ask(STREAMED)).end is End.WRONG


async def test_a_connection_that_broke_is_no_error_of_the_server():
    async with one_lane(FakeInference(failures=[grpc.StatusCode.UNAVAILABLE])) as load:
        assert (await load.ask(WHOLE)).end is End.CUT_OFF


async def test_what_is_not_answered_by_its_deadline_has_hung():
    async with one_lane(FakeInference(holds=True), deadline_s=0.2) as load:
        assert (await load.ask(STREAMED)).end is End.HUNG


async def test_as_many_as_are_wanted_are_under_way_and_all_end():
    service = FakeInference()
    with serving(service) as target:
        async with loading(
            target, [STREAMED, WHOLE], {"True": (RIGHT,), "False": (RIGHT,)}, num_in_flight=4, deadline_s=30
        ) as load:
            await load.until(lambda: load.num_open == 4)
            await load.until(lambda: len(load.outcomes) >= 20)
        assert load.num_open == 0
        assert {outcome.end for outcome in load.outcomes} == {End.CORRECT}
        assert {outcome.case for outcome in load.outcomes} == {"True", "False"}


async def test_after_an_error_a_lane_comes_again_when_it_may():
    service = FakeInference(failures=[Overloaded("full", retry_after_s=0.3)])
    with serving(service) as target:
        async with loading(target, [WHOLE], {"False": (RIGHT,)}, num_in_flight=1, deadline_s=30) as load:
            await load.until(lambda: len(load.outcomes) >= 2)
    refused, answered = load.outcomes[:2]
    assert (refused.end, answered.end) == (End.ERROR, End.CORRECT)
    assert answered.started_s - refused.ended_s >= 0.3
    await asyncio.sleep(0)
