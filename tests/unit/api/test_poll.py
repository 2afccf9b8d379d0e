"""Many ask, one is asked."""

from __future__ import annotations

import asyncio

import pytest

from shoal.api.poll import BELIEVED_S, SharedPoll
from shoal.cluster import directory
from shoal.cluster.balancer import Balancer
from shoal.cluster.gateway_replica import PoolBackend
from shoal.config import ShoalConfig
from shoal.wire.messages import Role


class Oracle:
    """Counts how often it's asked; answers with that number, or fails, when it's ``free``."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.error: Exception | None = None
        self.free = asyncio.Event()
        self.free.set()
        self.now_s = 0.0
        self.poll = SharedPoll(self.ask, clock=lambda: self.now_s)

    async def ask(self) -> int:
        self.num_asked += 1
        number, error = self.num_asked, self.error
        await self.free.wait()
        if error is not None:
            raise error
        return number


async def test_all_who_ask_meanwhile_wait_for_one_answer() -> None:
    oracle = Oracle()
    oracle.free.clear()
    waiting = [asyncio.create_task(oracle.poll.answer()) for _ in range(500)]
    await asyncio.sleep(0)
    oracle.now_s += 10 * BELIEVED_S
    waiting += [asyncio.create_task(oracle.poll.answer()) for _ in range(500)]
    await asyncio.sleep(0)
    oracle.free.set()
    assert set(await asyncio.gather(*waiting)) == {1}


async def test_one_who_stops_waiting_leaves_the_others_their_answer() -> None:
    oracle = Oracle()
    oracle.free.clear()
    first, second = (asyncio.create_task(oracle.poll.answer()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    oracle.free.set()
    assert first.cancelled() and await second == 1


async def test_a_failure_is_an_answer_like_any() -> None:
    oracle = Oracle()
    oracle.error = ConnectionError("no head")
    for _ in range(2):
        with pytest.raises(ConnectionError, match="no head"):
            await oracle.poll.answer()
    assert oracle.num_asked == 1
    oracle.error = None
    oracle.now_s += BELIEVED_S
    assert await oracle.poll.answer() == 2


async def test_ray_is_asked_once_for_all_who_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(directory, "registered", lambda _app, role: asked.append(role) or ())  # type: ignore[func-returns-value]

    backend = PoolBackend(ShoalConfig(), directory.LivingPool("shoal", "decode"), None, Balancer())  # type: ignore[arg-type]
    answers = await asyncio.gather(*(backend.readiness() for _ in range(500)))
    assert {answer.num_decode for answer in answers} == {0}
    assert sorted(asked) == ["decode", "prefill"]


async def test_who_was_there_is_ready_while_rays_head_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    def registered(_app: str, role: Role) -> tuple[directory.Entry, ...]:
        if is_silent:
            raise ConnectionError("no head")
        return (directory.Entry("shoal", role, role, role, "node", 1, "127.0.0.1:1"),)

    is_silent = False
    monkeypatch.setattr(directory, "registered", registered)
    backend = PoolBackend(ShoalConfig(), directory.LivingPool("shoal", "decode"), None, Balancer())  # type: ignore[arg-type]
    ready = await backend.readiness()
    is_silent = True
    monkeypatch.setattr(backend, "_readiness", SharedPoll(backend._ask_readiness))  # nothing is remembered
    assert await backend.readiness() == ready and (ready.num_decode, ready.num_prefill) == (1, 1)
