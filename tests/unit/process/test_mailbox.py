from __future__ import annotations

import queue
import sys
import threading
import time
from collections import deque

import pytest

from shoal.process.mailbox import Mailbox


def test_what_was_put_is_taken_in_its_order() -> None:
    mailbox: Mailbox[int] = Mailbox()
    for number in range(3):
        mailbox.put(number)
    assert [mailbox.take(), mailbox.take(None), mailbox.take(1.0)] == [0, 1, 2]
    with pytest.raises(queue.Empty):
        mailbox.take()


@pytest.mark.parametrize("wait_s", [60.0, None])
def test_whoever_waits_is_woken(wait_s: float | None) -> None:
    mailbox: Mailbox[str] = Mailbox()
    taken: list[str] = []
    waiting = threading.Thread(target=lambda: taken.extend((mailbox.take(wait_s), mailbox.take(wait_s))), daemon=True)
    waiting.start()
    mailbox.put("first")
    mailbox.put("second")
    waiting.join(30)
    assert taken == ["first", "second"]


def test_one_that_rang_for_what_is_taken_already_wakes_nobody() -> None:
    mailbox: Mailbox[int] = Mailbox()
    mailbox._items = looked_at = LookedAt()
    mailbox.put(0)
    mailbox.take()
    looked_at.num_looks = 0
    began_s = time.monotonic()
    with pytest.raises(queue.Empty):
        mailbox.take(0.2)
    assert time.monotonic() - began_s >= 0.2
    assert looked_at.num_looks < 10  # it slept


class LookedAt(deque[int]):
    num_looks = 0

    def popleft(self) -> int:
        self.num_looks += 1
        return super().popleft()


def test_however_short_a_wait_is_it_ends() -> None:
    mailbox: Mailbox[int] = Mailbox()

    def look_often() -> None:
        for _ in range(200_000):
            mailbox.put(0)
            mailbox.take()
            with pytest.raises(queue.Empty):
                mailbox.take(1e-9)

    looking = threading.Thread(target=look_often, daemon=True)
    looking.start()
    looking.join(60)
    assert not looking.is_alive()


def test_many_put_and_nothing_is_lost() -> None:
    mailbox: Mailbox[tuple[int, int]] = Mailbox()
    putting = [
        threading.Thread(target=lambda of=of: [mailbox.put((of, number)) for number in range(5_000)])  # type: ignore[misc]
        for of in range(4)
    ]
    for thread in putting:
        thread.start()
    taken = [mailbox.take(30.0) for _ in range(20_000)]
    assert [[number for by, number in taken if by == of] for of in range(4)] == [list(range(5_000))] * 4


def test_no_ring_is_lost_where_nobody_puts_once_more() -> None:
    there: Mailbox[int] = Mailbox()
    back: Mailbox[int] = Mailbox()

    def answer() -> None:
        for _ in range(50_000):
            back.put(there.take(None))

    answering = threading.Thread(target=answer, daemon=True)
    answering.start()
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # between any two instructions
    try:
        for number in range(50_000):
            there.put(number)
            assert back.take(60.0) == number
    finally:
        sys.setswitchinterval(interval_s)
    answering.join(60)
    assert not answering.is_alive()


def test_more_may_be_put_in_the_midst_of_whatever_it_does() -> None:
    """As where an object ends that the garbage collector comes by: anywhere, on any thread."""
    mailbox: Mailbox[str] = Mailbox()
    is_midst = True

    def put_more(frame: object, event: str, argument: object) -> None:
        nonlocal is_midst
        if not is_midst:
            is_midst = True
            mailbox.put("more")
            is_midst = False

    taken: list[str] = []

    def use() -> None:
        nonlocal is_midst
        sys.setprofile(put_more)
        is_midst = False
        mailbox.put("first")
        taken.extend(mailbox.take(30.0) for _ in range(4))
        is_midst = True
        sys.setprofile(None)

    using = threading.Thread(target=use, daemon=True)
    using.start()
    using.join(30)
    assert not using.is_alive()
    assert "first" in taken
    assert "more" in taken
