from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from shoal.api.backend import Readiness
from shoal.api.draining import DrainingBackend
from shoal.errors import Unavailable


class Pool:
    """Yields one output for each ``step.set()``; counts what is open."""

    def __init__(self, num_outputs: int) -> None:
        self._num_outputs = num_outputs
        self.step = asyncio.Event()
        self.num_open = 0

    async def generate(self, _request: Any) -> AsyncGenerator[Any, None]:
        self.num_open += 1
        try:
            for index in range(self._num_outputs):
                await self.step.wait()
                self.step.clear()
                yield f"output {index}"
        finally:
            self.num_open -= 1

    async def readiness(self) -> Readiness:
        return Readiness(num_decode=1, num_prefill=1)


async def collect(backend: DrainingBackend, into: list[Any]) -> None:
    async for output in backend.generate(None):  # type: ignore[arg-type]
        into.append(output)  # noqa: PERF401 - those before an error count, too


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_what_is_open_may_finish():
    pool, outputs = Pool(2), []
    backend = DrainingBackend(pool)
    answer = asyncio.create_task(collect(backend, outputs))
    await settle()
    drain = asyncio.create_task(backend.drain(60))
    for _ in range(2):
        await settle()
        assert not drain.done()
        pool.step.set()
    await asyncio.wait_for(asyncio.gather(answer, drain), 1)
    assert outputs == ["output 0", "output 1"]


async def test_what_is_new_is_refused_and_the_server_no_longer_ready():
    pool = Pool(1)
    backend = DrainingBackend(pool)
    assert (await backend.readiness()).is_ready
    await backend.drain(60)
    with pytest.raises(Unavailable, match="shutting down") as refusal:
        await collect(backend, [])
    assert refusal.value.retry_after_s
    assert pool.num_open == 0
    assert not (await backend.readiness()).is_ready


async def test_what_does_not_finish_in_time_ends_with_an_error_and_frees_the_pool():
    pool, outputs = Pool(2), []
    backend = DrainingBackend(pool)
    answer = asyncio.create_task(collect(backend, outputs))
    pool.step.set()
    await settle()
    assert outputs == ["output 0"]
    await backend.drain(0.01)
    assert pool.num_open == 0
    with pytest.raises(Unavailable, match="shutting down"):
        await answer


async def test_an_answer_whose_client_stopped_reading_does_not_hold_the_drain_up():
    pool = Pool(2)
    backend = DrainingBackend(pool)
    outputs = backend.generate(None)  # type: ignore[arg-type]
    pool.step.set()
    assert await anext(outputs) == "output 0"
    await asyncio.wait_for(backend.drain(0.01), 5)
    with pytest.raises(Unavailable, match="shutting down"):
        await anext(outputs)
    assert pool.num_open == 0


async def test_a_client_that_leaves_counts_as_finished():
    pool = Pool(1)
    backend = DrainingBackend(pool)
    answer = asyncio.create_task(collect(backend, []))
    await settle()
    assert pool.num_open == 1
    answer.cancel()
    await asyncio.wait_for(backend.drain(60), 1)
    assert pool.num_open == 0
