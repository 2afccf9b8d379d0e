"""Ctrl-C, SIGTERM and a terminal that is closed, at a moment that suits.

A half-started Ray can't be stopped cleanly: processes of it would stay behind, or this one would crash. So what comes
while Ray starts or stops is noted, and raised after. In between each signal raises KeyboardInterrupt.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_TAKE_PERIOD_S = 0.02


class Interrupts:
    """Made by ``caught``. Lives in the main thread, as signals do; elsewhere it does nothing."""

    def __init__(self, signals: Sequence[signal.Signals]) -> None:
        self._signals = signals
        self._num_holds = 0
        self._noted = False
        self._has_hung_up = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Note signals within the block; raise KeyboardInterrupt after it if there was one. May be nested.

        An exception of the block goes first: the signal is then dropped, for things end anyway.
        """
        self._num_holds += 1
        try:
            yield
        except BaseException:
            self._noted = False
            raise
        finally:
            self._take()
            self._num_holds -= 1
        if self._noted and self._num_holds == 0:
            self._noted = False
            raise KeyboardInterrupt

    def wait(self, future: Future[T]) -> T:
        """The result of ``future``, with signals held until it's there."""
        with self.held():
            while not futures.wait([future], timeout=_TAKE_PERIOD_S).done:
                # Ray's native code takes SIGTERM when it starts, and gives it to the system when it ends.
                self._take()
            return future.result()

    def _take(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            if self._has_hung_up:
                return  # a terminal closes once, and both the shell and the system say so
            self._has_hung_up = True
        if self._num_holds:
            self._noted = True
        else:
            raise KeyboardInterrupt


@contextmanager
def caught() -> Iterator[Interrupts]:
    """Take the signals for the block, and give them back to whoever had them."""
    # nohup ignores SIGHUP, and is to have its way.
    ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    signals = _SIGNALS if ignores_hangup else (*_SIGNALS, signal.SIGHUP)
    interrupts = Interrupts(signals)
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = {number: signal.getsignal(number) for number in signals}
    interrupts._take()
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
