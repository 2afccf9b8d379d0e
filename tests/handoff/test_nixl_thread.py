"""The thread that calls NIXL, without NIXL."""

from __future__ import annotations

import logging
import threading

import pytest

from shoal.errors import Unavailable
from shoal.handoff.carriers.nixl.thread import NixlThread


def test_what_was_submitted_is_finished_before_the_end():
    thread, done = NixlThread(), []
    futures = [thread.submit(lambda number=number: done.append(number)) for number in range(3)]  # type: ignore[misc]
    thread.close()
    assert done == [0, 1, 2] and all(future.done() for future in futures)
    with pytest.raises(Unavailable, match="closed"):
        thread.submit(lambda: None).result(0)
    thread.close()


def test_a_call_that_hangs_does_not_hold_up_the_end_of_the_process(caplog: pytest.LogCaptureFixture):
    thread, hangs, may_end = NixlThread(), threading.Event(), threading.Event()

    def hang() -> bool:
        hangs.set()
        return may_end.wait(30)

    future, behind = thread.submit(hang), thread.submit(lambda: "behind it")
    assert hangs.wait(10)
    with caplog.at_level(logging.WARNING):
        thread.close(within_s=0.05)
    assert "hasn't ended" in caplog.text
    for one in (future, behind):
        with pytest.raises(Unavailable, match="hangs"):
            one.result(0)
    may_end.set()
    thread._thread.join(10)
    assert not thread._thread.is_alive()


def test_who_is_to_be_polled_again_is_though_nobody_calls_any_more():
    """However short the wait was: READs would hang, whose end nobody else sees."""
    thread, enough = NixlThread(), threading.Event()

    class Polled:
        num_left = 100_000

        def poll(self, now_s: float) -> float | None:
            self.num_left -= 1
            if self.num_left == 0:
                enough.set()
                return None
            if self.num_left % 2:
                thread.wake()
            return 1e-9

    thread.submit(lambda: thread.add(Polled()))
    assert enough.wait(60)
    thread.close()
