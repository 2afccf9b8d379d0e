from __future__ import annotations

import queue
import threading
import time

import pytest

from shoal.inbox import Inbox


def test_what_was_put_is_taken_in_its_order() -> None:
    inbox: Inbox[int] = Inbox()
    for number in range(3):
        inbox.put(number)
    assert [inbox.take(), inbox.take(None), inbox.take(1.0)] == [0, 1, 2]
    with pytest.raises(queue.Empty):
        inbox.take()


@pytest.mark.parametrize("wait_s", [60.0, None])
def test_whoever_waits_is_woken(wait_s: float | None) -> None:
    inbox: Inbox[str] = Inbox()
    taken: list[str] = []
    waiting = threading.Thread(target=lambda: taken.extend((inbox.take(wait_s), inbox.take(wait_s))), daemon=True)
    waiting.start()
    inbox.put("first")
    inbox.put("second")
    waiting.join(30)
    assert taken == ["first", "second"]


def test_one_that_rang_for_what_is_taken_already_wakes_nobody() -> None:
    inbox: Inbox[int] = Inbox()
    inbox.put(0)
    inbox.take()
    began_s = time.monotonic()
    with pytest.raises(queue.Empty):
        inbox.take(0.05)
    assert time.monotonic() - began_s >= 0.05


def test_however_short_a_wait_is_it_ends() -> None:
    inbox: Inbox[int] = Inbox()

    def look_often() -> None:
        for _ in range(200_000):
            inbox.put(0)
            inbox.take()
            with pytest.raises(queue.Empty):
                inbox.take(1e-9)

    looking = threading.Thread(target=look_often, daemon=True)
    looking.start()
    looking.join(60)
    assert not looking.is_alive()


def test_many_put_and_nothing_is_lost() -> None:
    inbox: Inbox[tuple[int, int]] = Inbox()
    putting = [
        threading.Thread(target=lambda of=of: [inbox.put((of, number)) for number in range(5_000)])  # type: ignore[misc]
        for of in range(4)
    ]
    for thread in putting:
        thread.start()
    taken = [inbox.take(30.0) for _ in range(20_000)]
    assert [[number for by, number in taken if by == of] for of in range(4)] == [list(range(5_000))] * 4
