"""Faults inside the engine stay with the request that had them; nothing is held afterwards."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from engines import Ask, assert_nothing_held, make_engine, run
from models import tiny_llama

from shoal.engine.build import warm_up
from shoal.engine.client import EngineClient
from shoal.engine.engine import Engine
from shoal.errors import InternalError, PeerGone
from shoal.wire.messages import Depth, SamplingParams, Stage

GREEDY = SamplingParams(max_tokens=4, temperature=0.0)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(torch.float32, layers=2)[1]


def spoil_logits(engine: Engine, monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    run_step = engine.runner.run

    def run_and_spoil(plan: Any) -> Any:
        output = run_step(plan)
        if output.logits is None:
            return output
        logits = output.logits.clone()
        logits[row] = torch.nan
        return replace(output, logits=logits)

    monkeypatch.setattr(engine.runner, "run", run_and_spoil)


def test_logits_that_are_no_numbers_end_their_own_request_alone(model: Any, monkeypatch: pytest.MonkeyPatch):
    engine = make_engine(model, 0)
    for name in "abc":
        engine.submit_generate(name, (3, 4, 5), Depth.FULL, GREEDY)
    with monkeypatch.context() as patched:
        spoil_logits(engine, patched, row=1)
        output = engine.step()
    assert [failure.request_id for failure in output.failures] == ["b"]
    assert [token.request_id for token in output.tokens] == ["a", "c"]
    while not engine.step().is_idle:
        pass
    assert_nothing_held(engine)


def test_a_step_that_fails_ends_its_requests_with_their_forks_and_the_engine_goes_on(
    model: Any, monkeypatch: pytest.MonkeyPatch
):
    engine = make_engine(model, 0)
    engine.submit_generate("forks", (3, 4, 5), Depth.FULL, SamplingParams(max_tokens=4, num_choices=3))
    with monkeypatch.context() as patched:
        patched.setattr("shoal.engine.engine.sample", broken)
        output = engine.step()
    assert {failure.request_id for failure in output.failures} == {"forks"}
    assert isinstance(output.failures[0].error, InternalError)
    assert "secret" not in output.failures[0].error.message
    assert_nothing_held(engine)
    assert len(run(engine, [Ask([1, 2, 3], 4)])[0]) == 4


def broken(*_args: Any) -> Any:
    raise RuntimeError("secret details")


@pytest.mark.parametrize("stage", Stage)
def test_a_replica_whose_first_step_fails_does_not_become_ready(
    model: Any, monkeypatch: pytest.MonkeyPatch, stage: Stage
):
    engine = make_engine(model, 1, stage=stage)
    monkeypatch.setattr("shoal.model.decoder.Decoder.forward", broken)
    with pytest.raises(InternalError):
        warm_up(engine, stage, torch.device("cpu"))


def test_a_warm_engine_holds_nothing(model: Any):
    for stage in Stage:
        engine = make_engine(model, 1, stage=stage)
        warm_up(engine, stage, torch.device("cpu"))
        assert_nothing_held(engine)


def test_an_answer_without_a_limit_ends_where_the_pool_does(model: Any):
    engine = make_engine(model, 0, num_blocks=3)
    params = SamplingParams(max_tokens=500, temperature=0.0, may_shorten=True)
    assert len(run(engine, [Ask([1, 2, 3], sampling=params)])[0]) == 3 * 4 - 3 + 1


async def test_an_engine_that_dies_tells_all_who_wait(model: Any):
    client = EngineClient(make_engine(model, 0), name="test")
    called = threading.Event()

    def die() -> Any:
        called.wait(10)
        raise RuntimeError("a defect of the scheduler")

    with client.open("waits") as inbox:
        await client.call(lambda engine: engine.submit_generate("waits", (1, 2), Depth.FULL, GREEDY, hold=True))
        await inbox.reserved()
        await client.call(lambda engine: setattr(engine.scheduler, "admit", die))
        client.post(Engine.counts)  # so that there is another step
        waits = asyncio.create_task(client.call(Engine.counts))
        await asyncio.sleep(0)  # the call is queued now
        called.set()
        with pytest.raises(PeerGone):  # which the gateway asks another replica for
            await asyncio.wait_for(inbox.next(), 10)
        with suppress(PeerGone):  # it may have been in time
            await asyncio.wait_for(waits, 10)
        with pytest.raises(PeerGone):
            await client.call(Engine.counts)
        assert not client.is_serving
    client.close()


async def test_an_engine_whose_steps_all_fail_is_not_healthy(model: Any, monkeypatch: pytest.MonkeyPatch):
    client = EngineClient(make_engine(model, 0), name="test")
    monkeypatch.setattr("shoal.model.decoder.Decoder.forward", broken)
    for name in "abc":
        assert client.is_serving
        with client.open(name) as inbox:
            await client.call(lambda engine, name=name: engine.submit_generate(name, (1, 2), Depth.FULL, GREEDY))
            with pytest.raises(InternalError):
                await inbox.next()
    assert not client.is_serving
    client.close()


async def test_a_prompt_that_makes_nan_takes_no_replica_however_often_it_is_retried_but_three_do(
    model: Any, monkeypatch: pytest.MonkeyPatch
):
    engine = make_engine(model, 0)
    spoil_logits(engine, monkeypatch, row=0)
    client = EngineClient(engine, name="test")

    async def fails(name: str, *prompt: int) -> None:
        with client.open(name) as inbox:
            await client.call(lambda engine: engine.submit_generate(name, prompt, Depth.FULL, GREEDY))
            with pytest.raises(InternalError, match="NaN"):
                await inbox.next()

    for attempt in range(4):
        await fails(f"attempt {attempt}", 3, 4, 5)
    assert client.is_serving
    for number in (6, 7):
        assert client.is_serving
        await fails(f"other {number}", 3, 4, number)
    assert not client.is_serving, "nothing but NaN, whatever is asked"
    client.close()


async def test_an_engine_with_some_requests_that_fail_is_healthy(model: Any, monkeypatch: pytest.MonkeyPatch):
    """In each step one fails, and another goes on: with its answer, or with a prompt in chunks."""
    for num_prompt_tokens in (2, 60):
        engine = make_engine(model, 0, max_step_tokens=8)
        client = EngineClient(make_engine(model, 0), name="test")
        engine.submit_generate("goes on", (3,) * num_prompt_tokens, Depth.FULL, replace(GREEDY, max_tokens=20))
        assert engine.step().num_rows == min(num_prompt_tokens, 8)
        for name in "abc":
            engine.submit_generate(name, (1, 2), Depth.FULL, GREEDY, timeout_s=1)
            with monkeypatch.context() as patched:
                spoil_logits(engine, patched, row=-1)
                output = engine.step()
            assert [failure.request_id for failure in output.failures] == [name]
            client._deliver(output)
            assert client.is_serving
        engine.finish("goes on")
        client.close()


def test_a_reservation_is_told_before_others_compute(model: Any):
    engine = make_engine(model, 0)
    engine.submit_generate("runs", (5, 6, 7), Depth.FULL, GREEDY)
    engine.submit_generate("waits", (8, 9), Depth.FULL, GREEDY, hold=True)
    first, second = engine.step(), engine.step()
    assert [told.request_id for told in first.reserved] == ["waits"] and not first.num_rows and not first.is_idle
    assert second.num_rows == 3 and not second.reserved
    for name in ("runs", "waits"):
        engine.finish(name)
    assert_nothing_held(engine)


def test_nobody_is_overtaken_by_what_comes_ten_seconds_later(model: Any):
    now_s = 100.0
    engine = make_engine(model, 0)
    engine._clock = lambda: now_s
    prompt = (3, 4, 5)
    engine.submit_generate("patient", prompt, Depth.FULL, GREEDY, timeout_s=600)
    engine.submit_generate("hurried", prompt, Depth.FULL, GREEDY, timeout_s=3)
    engine.submit_generate("patient too", prompt, Depth.FULL, GREEDY)
    now_s += 9
    engine.submit_generate("late", prompt, Depth.FULL, GREEDY, timeout_s=3)
    now_s -= 5
    engine.submit_generate("later", prompt, Depth.FULL, GREEDY, timeout_s=1)
    assert [one.request_id for one in engine.scheduler.waiting] == [
        "hurried",
        "later",
        "patient",
        "patient too",
        "late",
    ]
