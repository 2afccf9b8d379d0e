"""A client that goes away, at each stage that its request can be at: both pools have all back within two seconds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from models import save_tiny

from shoal.cluster.local import LocalShoal, OneReplica, open_local
from shoal.config import load_config
from shoal.decode import admission
from shoal.engine.runner import Runner
from shoal.errors import DeadlineExceeded, Overloaded
from shoal.wire.handoff_messages import Grant, HandoffOutcome
from shoal.wire.messages import Depth, GenerateRequest, RequestContext, SamplingParams

WITHIN_S = 2.0
PROMPT = tuple(range(5, 69))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, dtype=torch.float32, layers=6)
    return folder


@asynccontextmanager
async def opened(folder: Path, **overrides: Any) -> AsyncIterator[LocalShoal]:
    stage = {"num_blocks": 64, "block_tokens": 4, "max_step_tokens": 16, "num_threads": 1}
    config = load_config(
        model={"name": str(folder), "skip_layers": 3, "dtype": "float32"},
        prefill=stage | overrides.pop("prefill", {}),
        decode=stage | overrides.pop("decode", {}),
        **overrides,
    )
    async with open_local(config) as local:
        yield local


def request(timeout_s: float = 60.0, max_tokens: int = 150) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return GenerateRequest(RequestContext("leaver", timeout_s), "tiny", PROMPT, Depth.SHALLOW, sampling)


async def read(local: LocalShoal, asked: GenerateRequest | None = None, has_read: asyncio.Event | None = None) -> None:
    """As the gateway's call does: cancelling it closes the stream."""
    async with aclosing(local.decode.worker.generate(asked or request())) as outputs:
        async for _ in outputs:
            if has_read is not None:
                has_read.set()


async def until(reached: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await reached():
            await asyncio.sleep(0)


async def nothing_is_held(local: LocalShoal) -> bool:
    if not local.decode.desk.idle.is_set():
        return False
    for stage in (local.decode, local.prefill):
        counts = await stage.counts()
        if (
            counts.num_waiting
            or counts.num_reserved
            or counts.num_running
            or counts.num_free_blocks < counts.num_blocks
        ):
            return False
    return True


async def leave(leaver: asyncio.Task[None], is_there: Callable[[], Awaitable[bool]]) -> None:
    leaver.cancel()
    async with asyncio.timeout(WITHIN_S):
        with suppress(asyncio.CancelledError):
            await leaver
        while await is_there():
            await asyncio.sleep(0)


async def assert_leaving_frees_all(local: LocalShoal, leaver: asyncio.Task[None]) -> None:
    leaver.cancel()
    async with asyncio.timeout(WITHIN_S):
        with suppress(asyncio.CancelledError):
            await leaver
        await until(lambda: nothing_is_held(local))


@asynccontextmanager
async def full_pool(local: LocalShoal) -> AsyncIterator[None]:
    """Somebody else holds all of decode's blocks."""
    engine = local.decode.engine
    with engine.open("other") as inbox:
        sampling = SamplingParams(max_tokens=1)
        await engine.call(
            lambda core: core.submit_generate("other", (5,) * 64 * 4, Depth.FULL, sampling, hold=True)
        )  # fmt: skip
        await inbox.reserved()
        assert (await local.decode.counts()).num_free_blocks == 0
        yield


async def test_while_it_waits_for_blocks(folder: Path):
    async with opened(folder) as local:
        async with full_pool(local):
            leaver = asyncio.create_task(read(local))

            async def is_waiting() -> bool:
                return (await local.decode.counts()).num_waiting == 1

            await until(is_waiting)
            await leave(leaver, is_waiting)
        await until(lambda: nothing_is_held(local))


class NobodyClaims(OneReplica):
    def __init__(self) -> None:
        self.has_asked = asyncio.Event()

    async def ask(self, _grant: Grant) -> HandoffOutcome:
        self.has_asked.set()
        await asyncio.Event().wait()
        raise AssertionError


async def test_while_its_lease_is_unclaimed(folder: Path):
    async with opened(folder) as local:
        local.decode.worker.prefill = pool = NobodyClaims()
        leaver = asyncio.create_task(read(local))
        await pool.has_asked.wait()
        assert local.decode.desk.table.counts.get("reserved") == 1
        await assert_leaving_frees_all(local, leaver)


async def test_while_prefill_waits_for_blocks(folder: Path):
    async with opened(folder) as local:
        engine = local.prefill.engine
        with engine.open("other") as inbox:
            await engine.call(lambda core: core.submit_prefill("other", 64 * 4))
            await inbox.reserved()
            leaver = asyncio.create_task(read(local))

            async def is_waiting() -> bool:
                return (await local.prefill.counts()).num_waiting == 1

            await until(is_waiting)
            await leave(leaver, is_waiting)
        await until(lambda: nothing_is_held(local))


async def test_while_chunks_come(folder: Path):
    async with opened(folder, prefill={"max_step_tokens": 1}) as local:
        leaver = asyncio.create_task(read(local))

        async def is_streaming() -> bool:
            return local.decode.desk.table.counts.get("streaming") == 1

        await until(is_streaming)
        await assert_leaving_frees_all(local, leaver)


async def test_during_its_boundary_step(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The engine is amid the step: it ends it, and then gives back what nobody wants any more."""
    run, is_there, may_go_on = Runner.run, threading.Event(), threading.Event()

    def slowly(self: Runner, plan: Any) -> Any:
        if any(rows.samples for rows in plan.rows):
            is_there.set()
            may_go_on.wait(30)
        return run(self, plan)

    async with opened(folder) as local:
        monkeypatch.setattr(Runner, "run", slowly)
        leaver = asyncio.create_task(read(local))
        await asyncio.to_thread(is_there.wait, 30)
        leaver.cancel()
        with suppress(asyncio.CancelledError):
            await leaver
        may_go_on.set()
        async with asyncio.timeout(WITHIN_S):
            await until(lambda: nothing_is_held(local))


async def test_while_it_is_decoded(folder: Path):
    async with opened(folder) as local:
        has_read = asyncio.Event()
        leaver = asyncio.create_task(read(local, has_read=has_read))
        await has_read.wait()
        await assert_leaving_frees_all(local, leaver)


# --- time, too, can end it ------------------------------------------------------------------------------


async def test_prefill_keeps_the_deadline_itself(folder: Path):
    """Even if decode, which claims and then says nothing more, doesn't."""
    async with opened(folder) as local:
        session = asyncio.Event()

        async def never(_address: str) -> Any:
            session.set()
            await asyncio.Event().wait()

        local.prefill.worker._sessions.get = never  # type: ignore[method-assign]
        context = RequestContext("late", timeout_s=2.0)
        grant = Grant(b"l" * 16, "memory", local.decode.served.plan_hash, 20, 0, 60.0, 60.0, context)
        with structlog.testing.capture_logs() as logs:
            outcome = await local.prefill.worker.prefill(grant)
        assert [log["reason"] for log in logs if log["event"] == "a hand-off failed"] == ["deadline_exceeded"]
        assert session.is_set() and outcome == HandoffOutcome(grant.lease_id, False, "deadline_exceeded")
        await until(lambda: nothing_is_held(local))


async def test_one_that_waits_for_blocks_is_given_up_at_its_deadline(folder: Path):
    async with opened(folder) as local:
        async with full_pool(local):
            with pytest.raises(DeadlineExceeded):
                await read(local, request(timeout_s=0.1))
        await until(lambda: nothing_is_held(local))


async def test_an_answer_that_stalls_ends_at_its_deadline_behind_what_has_come(folder: Path):
    async with opened(folder) as local:
        goes_on, told = threading.Event(), list[int]()

        async def stall_after_three() -> None:
            async with aclosing(local.decode.worker.generate(request(timeout_s=2.0))) as outputs:
                async for output in outputs:
                    told.extend(output.token_ids)
                    if len(told) == 3:
                        await local.decode.engine.call(lambda _: None)  # the token of a step waits to be read
                        local.decode.engine.post(lambda _: goes_on.wait(30) and None)

        try:
            with pytest.raises(DeadlineExceeded):
                await stall_after_three()
        finally:
            goes_on.set()
        assert 3 < len(told) < 150
        await until(lambda: nothing_is_held(local))


async def test_what_would_be_too_late_is_refused_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """So many come that most are too late; of those that come after them, some needn't try."""
    run = Runner.run

    def slowly(self: Runner, plan: Any) -> Any:
        threading.Event().wait(0.001)  # all of them take longer than they have, however fast the machine is
        return run(self, plan)

    monkeypatch.setattr(admission, "_LEAST_S", 0.0)  # the model is tiny
    async with opened(folder, decode={"num_blocks": 1024, "max_sequences": 1}) as local:
        monkeypatch.setattr(Runner, "run", slowly)
        refused: list[Overloaded] = []
        async with asyncio.timeout(30):
            while not refused:
                asked = [asyncio.create_task(read(local, request(timeout_s=0.2, max_tokens=40))) for _ in range(24)]
                ended = await asyncio.gather(*asked, return_exceptions=True)
                refused = [one for one in ended if isinstance(one, Overloaded)]
                assert all(one is None or isinstance(one, Overloaded | DeadlineExceeded) for one in ended)
        assert all(0 < (one.retry_after_s or 0) <= 0.2 and "too much is asked" in one.message for one in refused)
        await until(lambda: nothing_is_held(local))
