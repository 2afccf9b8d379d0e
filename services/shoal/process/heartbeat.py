"""How a thread says that it comes further, so that others notice when it doesn't.

::

    beat ─> beat ─> …     it has something to do, and has come a step further
      └─> rest            it waits for work: however long that takes, all is well
    stop                  it has ended, and nobody does its work any more

It's the thread that calls, and others that look (watch.py). A number and a flag are all there is: no lock. Native code
can't beat, so how long the processor has worked for the thread is known as well: one that computes hasn't hung.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Heartbeat:
    """One thread's: that of the first beat, or the one that made it ``of_this_thread``. ``name`` is for metrics."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_stopped = False
        self._num_beats = 0
        self._is_resting = True
        self._clock: int | None = None

    @classmethod
    def of_this_thread(cls, name: str) -> Heartbeat:
        """Others may beat for it."""
        heartbeat = cls(name)
        heartbeat._clock = _clock_of_this_thread()
        return heartbeat

    @property
    def num_beats(self) -> int | None:
        """As long as this is one and the same number, the thread has work and doesn't come further. At rest, none."""
        return None if self._is_resting else self._num_beats

    @property
    def cpu_s(self) -> float:
        """Seconds that the processor has worked for the thread; 0 where that isn't known."""
        try:
            return 0.0 if self._clock is None else time.clock_gettime(self._clock)
        except OSError:  # it has ended
            return 0.0

    def beat(self) -> None:
        if self._clock is None:
            self._clock = _clock_of_this_thread()
        self._num_beats += 1
        self._is_resting = False

    def rest(self) -> None:
        self._is_resting = True

    def stop(self) -> None:
        self.is_stopped = True

    @contextmanager
    def at_work(self) -> Iterator[None]:
        self.beat()
        try:
            yield
        finally:
            self.rest()


class SingleThread(ThreadPoolExecutor):
    """An executor of one thread, whose heart beats when it takes something up."""

    def __init__(self, name: str, initializer: Callable[[], None] | None = None) -> None:
        super().__init__(1, f"shoal-{name}", initializer)
        self.heartbeat = Heartbeat(name)

    def submit(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Raises RuntimeError if there is no thread for it: it couldn't be started, or prepared, or is closed. Then it
        never runs."""
        refused = threading.Event()
        try:
            return super().submit(self._at_work, partial(work, *args, **kwargs), refused)
        except RuntimeError:
            # It's in the queue by now, where a thread that is started for what comes later would find it.
            refused.set()
            self.heartbeat.stop()
            raise

    def _at_work(self, work: Callable[[], T], refused: threading.Event) -> T:
        if refused.is_set():
            raise RuntimeError("nobody waits for it any more")
        with self.heartbeat.at_work():
            return work()


def _clock_of_this_thread() -> int:
    return time.pthread_getcpuclockid(threading.get_ident())
