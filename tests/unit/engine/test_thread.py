"""When steps begin, and when the event loop is told what one brought: as the next one computes, and never behind what
came later."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines import make_engine, torch_threads
from models import tiny_llama

from shoal.engine.client import EngineClient, Progress
from shoal.engine.engine import Engine
from shoal.engine.events import StepOutput, TokenEvent
from shoal.engine.scheduler import Scheduler
from shoal.engine.yielding import Yielding
from shoal.errors import PeerGone
from shoal.wire.messages import Depth, SamplingParams

SAMPLING = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(torch.float32, layers=2)[1]


def logged(log: list[str], what: str, function: Callable[..., Any], before: Callable[[], object] = list) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        log.append(what)
        before()
        return function(*arguments, **options)

    return call


def watched(
    engine: Engine, log: list[str], before_computing: Callable[[], object] = list, stream_interval: int = 1
) -> EngineClient:
    """``engine``, which logs what it does in its thread, and what it hands to the loop."""
    engine.scheduler.schedule = logged(log, "schedules", engine.scheduler.schedule)  # type: ignore[method-assign]
    decoder = engine.runner.decoder
    decoder.embed = logged(log, "embeds", decoder.embed)  # type: ignore[method-assign]
    attention = decoder._attention
    first = logged(log, "computes", attention, before_computing)
    decoder._attention = lambda index, *rest: (attention if index else first)(index, *rest)  # type: ignore[method-assign]
    client = EngineClient(engine, name="test", stream_interval=stream_interval)
    hand_over = client._thread._on_loop

    def on_loop(function: Callable[..., None], *arguments: Any) -> None:
        if function == client._thread._deliver_all:
            log.extend("told" for output in arguments[0] for _ in output.tokens)
        elif arguments and isinstance(arguments[0], asyncio.Future):
            log.append("answered")
        hand_over(function, *arguments)

    client._thread._on_loop = on_loop  # type: ignore[method-assign]
    return client


async def test_a_token_is_told_as_the_next_step_computes_and_the_last_at_once(model: Any) -> None:
    log: list[str] = []
    client = watched(make_engine(model, 0), log)
    with client.open("asks") as inbox:
        await client.call(lambda engine: engine.submit_generate("asks", (1, 2), Depth.FULL, SAMPLING))
        for _ in range(4):
            await asyncio.wait_for(inbox.next(), 10)
    client.close()
    steps = log[log.index("computes") : len(log) - log[::-1].index("told")]
    # Not before what Python has to do for the layers: the loop would take it from this thread.
    assert steps == ["computes", *["schedules", "embeds", "told", "computes"] * 3, "schedules", "told"]


async def test_tokens_in_the_midst_of_an_answer_are_told_some_steps_at_a_time(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.engine.outbox.MAX_HELD_S", 3600.0)  # however slow this machine is
    log: list[str] = []
    client = watched(make_engine(model, 0), log, stream_interval=3)
    sampling = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    with client.open("asks") as inbox:
        await client.call(lambda engine: engine.submit_generate("asks", (1, 2), Depth.FULL, sampling))
        came = [await asyncio.wait_for(inbox.next(), 10) for _ in range(6)]
    client.close()
    steps = log[log.index("computes") : len(log) - log[::-1].index("told")]
    begun, computed = ["schedules", "embeds"], ["schedules", "embeds", "computes"]
    assert steps == [
        "computes", *begun, "told", "computes",  # the first token
        *computed, *computed, *begun, "told", "told", "told", "computes",  # three
        *computed, "schedules", "told", "told",  # and at the end what there is
    ]  # fmt: skip
    assert [one.event.index for one in came if isinstance(one, Progress) and isinstance(one.event, TokenEvent)] == [
        *range(6)
    ]


@pytest.mark.parametrize("stream_interval", [1, 9])
async def test_a_command_that_comes_during_a_step_is_answered_after_all_tokens(
    model: Any, monkeypatch: pytest.MonkeyPatch, stream_interval: int
) -> None:
    monkeypatch.setattr("shoal.engine.outbox.MAX_HELD_S", 3600.0)
    log: list[str] = []
    computes, may_go_on = threading.Event(), threading.Event()

    def wait() -> None:
        if log.count("computes") == 3:
            computes.set()
            may_go_on.wait(10)

    client = watched(make_engine(model, 0), log, wait, stream_interval)
    with client.open("asks"):
        await client.call(lambda engine: engine.submit_generate("asks", (1, 2), Depth.FULL, SAMPLING))
        await asyncio.to_thread(computes.wait, 10)
        counts = asyncio.create_task(client.call(Engine.counts))
        await asyncio.sleep(0)  # the call is queued now
        log.clear()
        may_go_on.set()
        await counts
        told = ["told"] if stream_interval == 1 else ["told", "told"]
        assert log[: len(told) + 1] == [*told, "answered"]
    client.close()


async def test_no_token_waits_for_a_step_with_a_prompt_in_it(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.engine.outbox.MAX_HELD_S", 3600.0)
    log: list[str] = []
    engine = make_engine(model, 0, max_step_tokens=4)
    client = watched(engine, log, stream_interval=9)
    sampling = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    with client.open("asks"), client.open("long") as long:

        def submit(engine: Engine) -> None:
            engine.submit_generate("asks", (1, 2), Depth.FULL, sampling)
            engine.submit_generate("long", tuple(range(1, 11)), Depth.FULL, SAMPLING)

        await client.call(submit)
        await asyncio.wait_for(long.next(), 10)
    client.close()
    steps = [what for what in log if what in {"told", "schedules"}]
    after_the_first = steps.index("told") + 1
    # Each piece of the prompt comes with a token of the other answer, which is told before the next piece.
    assert steps[after_the_first : after_the_first + 4] == ["told", "schedules", "told", "schedules"]


async def test_who_yields_keeps_nothing_back(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.engine.outbox.MAX_HELD_S", 3600.0)
    engine = make_engine(model, 0)

    def are_on_their_way(_to_this: bool) -> bool:
        return any(len(choice.output) == 3 for choices in engine._sequences.values() for choice in choices.values())

    client = EngineClient(engine, name="test", yielding=Yielding(3600.0, are_on_their_way), stream_interval=9)
    try:
        with client.open("answer") as answer:
            await client.call(lambda engine: engine.submit_generate("answer", (1, 2), Depth.FULL, SAMPLING))
            for _ in range(3):
                await asyncio.wait_for(answer.next(), 10)
    finally:
        client.close()


async def test_whoever_fails_on_one_output_gets_the_others_all_the_same(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.engine.outbox.MAX_HELD_S", 3600.0)

    def fail(output: StepOutput) -> None:
        if output.tokens:
            raise RuntimeError("a defect of a metric")

    client = EngineClient(make_engine(model, 0), name="test", on_step=fail, stream_interval=9)
    try:
        with client.open("answer") as answer:
            await client.call(lambda engine: engine.submit_generate("answer", (1, 2), Depth.FULL, SAMPLING))
            for _ in range(4):
                await asyncio.wait_for(answer.next(), 10)
    finally:
        client.close()


async def test_what_was_kept_back_comes_before_the_end_of_the_engine(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.engine.outbox.MAX_HELD_S", 3600.0)
    engine = make_engine(model, 0)
    schedule = engine.scheduler.schedule

    def fail() -> Any:
        if any(len(choice.output) == 3 for choices in engine._sequences.values() for choice in choices.values()):
            raise RuntimeError("broken")
        return schedule()

    engine.scheduler.schedule = fail  # type: ignore[method-assign]
    client = EngineClient(engine, name="test", stream_interval=9)
    with client.open("answer") as answer:
        await client.call(lambda engine: engine.submit_generate("answer", (1, 2), Depth.FULL, SAMPLING))
        for _ in range(3):
            await asyncio.wait_for(answer.next(), 10)
        with pytest.raises(PeerGone):
            await asyncio.wait_for(answer.next(), 10)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is a process' own")
@pytest.mark.parametrize("by", [0, 2])
async def test_its_thread_steps_back_for_others_and_the_loop_does_not(model: Any, by: int) -> None:
    def niceness(_engine: object = None) -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = niceness()
    client = EngineClient(make_engine(model, 0), name="test", niceness=by)
    try:
        assert await asyncio.wait_for(client.call(niceness), 10) == min(19, before + by)
    finally:
        client.close()
    assert niceness() == before


async def num_said(client: EngineClient, request_id: str) -> int:
    """Tokens so far. The thread looks for something to do between any two of the calls."""
    for _ in range(3):
        number = await client.call(lambda engine: len(engine._sequences[request_id][0].output))
    return number


@pytest.mark.parametrize("yields", [True, False])
async def test_while_a_prompt_is_on_its_way_answers_leave_the_cores_to_it(model: Any, yields: bool) -> None:
    client = EngineClient(make_engine(model, 0), name="test", yielding=Yielding(3600.0 if yields else 0.0))
    try:
        with client.open("on its way") as on_its_way, client.open("answer") as answer, client.open("short") as short:
            await client.call(
                lambda engine: engine.submit_generate("on its way", (3, 4), Depth.FULL, SAMPLING, hold=True)
            )
            await asyncio.wait_for(on_its_way.reserved(), 10)
            await client.call(lambda engine: engine.submit_generate("answer", (1, 2), Depth.FULL, SAMPLING))
            await asyncio.wait_for(answer.next(), 10)  # its prompt is computed at once, and it is told at once
            if not yields:
                for _ in range(3):
                    await asyncio.wait_for(answer.next(), 10)
                return
            assert await num_said(client, "answer") == 1
            # Who comes with a prompt to compute, or with one that has arrived, takes the others along.
            await client.call(lambda engine: engine.submit_generate("short", (5, 6), Depth.FULL, SAMPLING))
            await asyncio.wait_for(short.next(), 10)
            await asyncio.wait_for(answer.next(), 10)
            assert await num_said(client, "answer") == await num_said(client, "short") + 1 == 2
            await client.call(lambda engine: engine.start("on its way"))
            for inbox in (on_its_way, short, answer):  # and then nobody is waited for
                for _ in range(2 if inbox is answer else 3):
                    await asyncio.wait_for(inbox.next(), 10)
    finally:
        client.close()


async def test_what_computes_nothing_puts_no_answer_off(model: Any) -> None:
    """Neither another prompt that is to come from prefill, nor one that there's no place for."""
    client = EngineClient(make_engine(model, 0, max_sequences=3), name="test", yielding=Yielding(3600.0))
    try:
        with client.open("answer") as answer, client.open("second") as second:
            await client.call(lambda engine: engine.submit_generate("first", (1, 2), Depth.FULL, SAMPLING, hold=True))
            await client.call(lambda engine: engine.submit_generate("answer", (1, 2), Depth.FULL, SAMPLING))
            await asyncio.wait_for(answer.next(), 10)
            began_s = client._thread._began_s
            await client.call(lambda engine: engine.submit_generate("second", (1, 2), Depth.FULL, SAMPLING, hold=True))
            await asyncio.wait_for(second.reserved(), 10)
            await client.call(lambda engine: engine.submit_generate("third", (1, 2), Depth.FULL, SAMPLING))
            assert await num_said(client, "answer") == 1
            assert client._thread._began_s == began_s > 0
    finally:
        client.close()


async def test_who_has_little_time_yields_to_nobody(model: Any) -> None:
    client = EngineClient(make_engine(model, 0), name="test", yielding=Yielding(3600.0))
    try:
        with client.open("on its way") as on_its_way, client.open("answer") as answer:
            await client.call(
                lambda engine: engine.submit_generate("on its way", (3, 4), Depth.FULL, SAMPLING, hold=True)
            )
            await asyncio.wait_for(on_its_way.reserved(), 10)
            await client.call(
                lambda engine: engine.submit_generate("answer", (1, 2), Depth.FULL, SAMPLING, timeout_s=5.0)
            )
            for _ in range(4):
                await asyncio.wait_for(answer.next(), 10)
    finally:
        client.close()


@pytest.mark.parametrize("count", [True, False])
async def test_prompts_on_their_way_elsewhere_count_where_cores_are_shared(model: Any, count: bool) -> None:
    told: list[bool] = []
    are_elsewhere = count

    def are_on_their_way(to_this: bool) -> bool:
        told.append(to_this)
        return are_elsewhere

    client = EngineClient(make_engine(model, 0), name="test", yielding=Yielding(3600.0, are_on_their_way))
    try:
        with client.open("answer") as answer, client.open("on its way") as on_its_way:
            await client.call(lambda engine: engine.submit_generate("answer", (1, 2), Depth.FULL, SAMPLING))
            await asyncio.wait_for(answer.next(), 10)
            if count:
                told.clear()
                while len(told) < 5:  # it looks again and again, and goes on waiting
                    await asyncio.sleep(0)
                assert await num_said(client, "answer") == 1
                are_elsewhere = False  # of which nobody tells
            for _ in range(3):
                await asyncio.wait_for(answer.next(), 10)
            assert not any(told)
            await client.call(
                lambda engine: engine.submit_generate("on its way", (3, 4), Depth.FULL, SAMPLING, hold=True)
            )
            await asyncio.wait_for(on_its_way.reserved(), 10)
            await client.call(Engine.counts)  # so that the thread has looked since
            assert told[-1]
    finally:
        client.close()
    assert not told[-1]  # nobody is to wait for what comes to an engine that has ended


async def test_however_short_a_wait_is_it_ends_by_itself(model: Any) -> None:
    """Also right after a command, and though none comes afterwards."""
    client = EngineClient(make_engine(model, 0), name="test", yielding=Hasty(200_000))  # type: ignore[arg-type]
    try:
        with client.open("answer") as answer:
            client._thread._yielding.post = client._thread.post  # type: ignore[attr-defined]
            await client.call(lambda engine: engine.submit_generate("answer", (1, 2), Depth.FULL, SAMPLING))
            for _ in range(4):
                await asyncio.wait_for(answer.next(), 30)
    finally:
        await asyncio.wait_for(asyncio.to_thread(client.close), 30)


class Hasty:
    """Has the engine wait for no time at all, so many times, and between two of them come a command."""

    def __init__(self, num_waits: int) -> None:
        self._num_left = num_waits
        self.post: Callable[[Callable[[Engine], object]], None] | None = None

    def wait_s(self, scheduler: Scheduler, began_s: float, now_s: float) -> float:
        if self.post is None or self._num_left == 0 or not scheduler.running:
            return 0.0
        self._num_left -= 1
        if self._num_left % 2:
            self.post(bool)
        return 1e-9

    def are_on_their_way(self, to_this: bool) -> bool:
        return to_this


async def test_closing_waits_for_no_prompt(model: Any) -> None:
    client = EngineClient(make_engine(model, 0), name="test", yielding=Yielding(3600.0))
    with client.open("on its way") as on_its_way, client.open("answer") as answer:
        await client.call(lambda engine: engine.submit_generate("on its way", (3, 4), Depth.FULL, SAMPLING, hold=True))
        await asyncio.wait_for(on_its_way.reserved(), 10)
        await client.call(lambda engine: engine.submit_generate("answer", (1, 2), Depth.FULL, SAMPLING))
        await asyncio.wait_for(answer.next(), 10)
        await asyncio.wait_for(asyncio.to_thread(client.close), 10)


async def test_what_others_say_of_their_threads_doesn_t_count_for_the_engine_s(model: Any):
    """A number that is said for one thread holds for all that ask torch for the first time from then on."""
    with torch_threads(3):
        client = EngineClient(make_engine(model, 0), name="test")
        try:
            await client.call(lambda _engine: None)  # it runs
            await asyncio.to_thread(torch.set_num_threads, 1)
            assert await client.call(lambda _engine: torch.get_num_threads()) == 3
        finally:
            client.close()


async def test_of_who_asks_an_engine_that_has_stopped_nothing_is_kept(model: Any) -> None:
    client = EngineClient(make_engine(model, 0), name="test")
    client.close()
    with pytest.raises(PeerGone):
        await client.call(Engine.counts)
    assert not client._thread._pending


class Endless:
    """Memory ahead of use, of which there's always more to take until ``is_far_enough``."""

    def __init__(self, log: list[str]) -> None:
        self.is_far_enough = False
        self.is_taken = threading.Event()
        self._log = log

    def take(self) -> None:
        self._log.append("takes")
        self.is_taken.set()
        time.sleep(1e-3)  # as the system takes some time


async def test_memory_is_taken_while_nobody_is_here(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for who is on the way: the cores may be busy with its prompt."""
    monkeypatch.setattr("shoal.engine.thread._PIECE_EVERY_S", 0.0)
    log: list[str] = []
    engine, endless = make_engine(model, 0), Endless(log)
    engine._ahead = endless  # type: ignore[assignment]
    client = watched(engine, log)
    assert await asyncio.to_thread(endless.is_taken.wait, 10)
    with client.open("asks") as inbox:
        await client.call(lambda engine: engine.submit_generate("asks", (3, 4), Depth.FULL, SAMPLING, hold=True))
        log.append("comes")
        await asyncio.wait_for(inbox.reserved(), 10)
        for _ in range(3):
            await client.call(Engine.counts)
        await client.call(lambda engine: engine.start("asks"))
        for _ in range(4):
            await asyncio.wait_for(inbox.next(), 10)
    endless.is_taken.clear()
    assert await asyncio.to_thread(endless.is_taken.wait, 10)
    endless.is_far_enough = True
    async with asyncio.timeout(10):
        while client._thread.heartbeat.num_beats is not None:  # at rest again
            await asyncio.sleep(0.01)
    client.close()
    assert log.count("computes") == 4
    assert "takes" not in log[log.index("comes") : len(log) - log[::-1].index("computes")]
