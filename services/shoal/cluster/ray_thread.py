"""The thread that starts Ray and lives as long as it.

Linux ends Ray's daemons with the thread that forked them, so that thread must stay. And off the main thread Ray leaves
SIGTERM alone; on it, Ray would answer with sys.exit, wherever it is in its own start.

A terminal that is closed tells all that was started in it. As Ray's processes heed no Ctrl-C, so they don't heed that:
they have answers to finish, and end with this process.
"""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class RayThread:
    """Runs calls one after the other. A daemon: a call that hangs in a broken Ray doesn't keep the process alive."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        self._calls.put(lambda: _settle(future, lambda: call(*args, **kwargs)))
        return future

    def close(self) -> None:
        """End the thread after the calls that were submitted."""
        self._calls.put(None)

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # those that it forks inherit that
        while (call := self._calls.get()) is not None:
            call()


def _settle(future: Future[Any], call: Callable[[], Any]) -> None:
    try:
        future.set_result(call())
    except BaseException as error:  # noqa: BLE001 - whatever it is, it goes to the one who waits
        future.set_exception(error)
