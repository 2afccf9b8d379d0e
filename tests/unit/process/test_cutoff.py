"""Work that ends when something else has, and only then."""

from __future__ import annotations

import asyncio

import pytest

from shoal.errors import PeerGone
from shoal.process.cutoff import Cutoff


@pytest.fixture
def cutoff() -> Cutoff:
    return Cutoff(lambda: PeerGone("it's over"))


async def test_what_waits_within_ends_at_once(cutoff: Cutoff):
    async def work() -> None:
        async with cutoff.within():
            await asyncio.Event().wait()

    several = [asyncio.create_task(work()) for _ in range(3)]
    await asyncio.sleep(0)
    cutoff.cut()
    cutoff.cut()
    for task in several:
        with pytest.raises(PeerGone, match="it's over"):
            await asyncio.wait_for(task, 10)


async def test_what_comes_later_does_not_begin(cutoff: Cutoff):
    cutoff.cut()
    with pytest.raises(PeerGone):
        async with cutoff.within():
            pytest.fail("it began")


async def test_what_has_ended_before_is_left_alone(cutoff: Cutoff):
    async with cutoff.within():
        pass
    cutoff.cut()
    await asyncio.sleep(0)


async def test_what_fails_within_fails_with_its_own_error(cutoff: Cutoff):
    for own in (ValueError, TimeoutError):
        with pytest.raises(own, match="its own"):
            async with cutoff.within():
                raise own("its own")


async def test_who_is_cancelled_meanwhile_stays_cancelled(cutoff: Cutoff):
    async def work() -> None:
        async with cutoff.within():
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    cutoff.cut()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_deadline_within_that_passes_meanwhile_is_not_told(cutoff: Cutoff):
    async def work() -> None:
        async with cutoff.within(), asyncio.timeout(0):
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    cutoff.cut()
    with pytest.raises(PeerGone):
        await task
