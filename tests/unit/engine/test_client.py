"""A request's events, one by one and some that are there."""

from __future__ import annotations

import asyncio

import pytest

from shoal.engine.client import Inbox, Progress
from shoal.engine.events import FailureEvent, TokenEvent
from shoal.errors import InternalError, PeerGone


def progress(index: int) -> Progress:
    return Progress(TokenEvent("asks", 0, index, 7, None, (), None, None, 0.0), 1.0)


async def test_what_is_here_comes_at_once_and_in_its_order_up_to_so_many():
    inbox = Inbox("asks")
    for index in range(6):
        inbox.put(progress(index))
    assert await inbox.next() == progress(0)
    assert await inbox.next_some(1) == [progress(1)]
    assert await inbox.next_some(2) == [progress(2), progress(3)]
    assert await inbox.next_some(9) == [progress(4), progress(5)]
    waiting = asyncio.create_task(inbox.next_some(9))
    await asyncio.sleep(0)
    assert not waiting.done(), "nothing is here"
    inbox.put(progress(6))
    assert await waiting == [progress(6)]


@pytest.mark.parametrize("failed", [FailureEvent("asks", 0, InternalError("broken")), PeerGone("broken")])
async def test_an_error_comes_after_what_came_before_it_and_stays(failed: FailureEvent | PeerGone):
    inbox = Inbox("asks")
    inbox.put(progress(0))
    inbox.put(failed)
    inbox.put(progress(1))
    assert await inbox.next_some(9) == [progress(0)]
    for _ in range(2):
        with pytest.raises((InternalError, PeerGone), match="broken"):
            await inbox.next_some(9)
        with pytest.raises((InternalError, PeerGone), match="broken"):
            await inbox.next()


async def test_an_error_that_is_first_is_raised():
    for all_at_once in (True, False):
        inbox = Inbox("asks")
        inbox.put(PeerGone("broken"))
        with pytest.raises(PeerGone, match="broken"):
            await (inbox.next_some(9) if all_at_once else inbox.next())
