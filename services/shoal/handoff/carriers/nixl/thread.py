"""The one thread of a process that calls NIXL: agents aren't made to be shared, and a READ may block until it's done.

It runs what it's given, one after another, and polls meanwhile whoever has something under way. If nobody has, it
sleeps: nothing here is a busy loop.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from shoal.errors import Unavailable
from shoal.process.heartbeat import Heartbeat
from shoal.process.mailbox import Mailbox

T = TypeVar("T")
_MIN_POLL_S = 50e-6
_MAX_POLL_S = 5e-3
_POLLS_PER_WAIT = 8
"""The longer something takes, the less it matters when exactly its end is seen."""
_CLOSE_S = 1.5
"""Less than a replica has to close (cluster/graph.py)."""
_log = logging.getLogger(__name__)


class Poller(Protocol):
    def poll(self, now_s: float) -> float | None:
        """See what has happened. Returns after how many seconds to come again; ``None``: not before more is done."""
        ...


class NixlThread:
    """Starts with the first call."""

    def __init__(self) -> None:
        self.heartbeat = Heartbeat("nixl")
        self._calls: Mailbox[Callable[[], object] | None] = Mailbox()
        self._pollers: list[Poller] = []
        self._thread = threading.Thread(target=self._run, name="shoal-nixl", daemon=True)
        self._lock = threading.Lock()
        self._open: set[Future[Any]] = set()
        self._is_closed = False
        self._wait_s: float | None = None

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Run ``work`` on the thread. The future has Unavailable once all is closed."""
        future: Future[T] = Future()
        with self._lock:
            if self._is_closed:
                future.set_exception(Unavailable("NIXL is closed in this process"))
                return future
            if self._thread.ident is None:
                self._thread.start()
            self._open.add(future)
            future.add_done_callback(self._open.discard)
            self._calls.put(lambda: _settle(future, work))
        return future

    async def call(self, work: Callable[[], T], *, undo: Callable[[T], object]) -> T:
        """Run ``work`` on the thread, and wait. If the caller is cancelled meanwhile, the thread undoes it."""
        future = self.submit(work)
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            # Also if it's done already: what it made is the thread's alone.
            future.add_done_callback(lambda done: done.exception() or self.submit(lambda: undo(done.result())))
            raise

    def wake(self) -> None:
        """Poll now. From any thread, and from where an object ends."""
        self._calls.put(_nothing)

    def add(self, poller: Poller) -> None:
        """On the thread itself, as ``remove``."""
        self._pollers.append(poller)

    def remove(self, poller: Poller) -> None:
        if poller in self._pollers:
            self._pollers.remove(poller)

    def close(self, within_s: float = _CLOSE_S) -> None:
        """Finish what was submitted, and end the thread. Twice is a no-op.

        One that hangs in NIXL can't be ended: after ``within_s`` it's left to the end of the process, and whoever waits
        for a call gets Unavailable.
        """
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._calls.put(None)
        if self._thread.ident is None:
            return
        self._thread.join(within_s)
        if self._thread.is_alive():
            _log.warning("a call of NIXL hasn't ended within %g s: its thread is left behind", within_s)
            for future in self._open.copy():
                _tell(future, Unavailable("a call of NIXL hangs, and this process ends"))

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        finally:
            self.heartbeat.stop()

    def _turn(self) -> bool:
        """Wait for a call, or until somebody is to be polled; False once closed."""
        self.heartbeat.rest()
        try:
            call = self._calls.take(self._wait_s)
        except queue.Empty:
            call = _nothing
        if call is None:
            return False
        self.heartbeat.beat()
        call()
        self._wait_s = self._poll()
        return True

    def _poll(self) -> float | None:
        now_s = time.monotonic()
        waits_s = [self._poll_one(poller, now_s) for poller in tuple(self._pollers)]
        return min((wait_s for wait_s in waits_s if wait_s is not None), default=None)

    def _poll_one(self, poller: Poller, now_s: float) -> float | None:
        try:
            return poller.poll(now_s)
        except Exception:  # noqa: BLE001 - the thread's edge: a defect in one session must not end all
            _log.exception("a session's NIXL isn't polled any more")
            self.remove(poller)
            return None


def poll_after(waited_s: float, *, min_s: float = _MIN_POLL_S, max_s: float = _MAX_POLL_S) -> float:
    """When to look again at something that has been under way for ``waited_s``."""
    return min(max(waited_s / _POLLS_PER_WAIT, min_s), max_s)


def _settle(future: Future[T], work: Callable[[], T]) -> None:
    try:
        result = work()
    except BaseException as error:  # noqa: BLE001 - the edge of a thread: whoever waits is told
        if not isinstance(error, Unavailable):
            _log.error("a call of NIXL failed", exc_info=error)
        _tell(future, error)
    else:
        with suppress(InvalidStateError):  # it hung, and nobody waits any more
            future.set_result(result)


def _tell(future: Future[Any], error: BaseException) -> None:
    with suppress(InvalidStateError):
        future.set_exception(error)


def _nothing() -> None: ...
