"""What other threads leave for one thread that takes it up, one after another.

``queue.SimpleQueue`` would do, but up to Python 3.12 its ``get`` may wait for ever where a short timeout ends before it
has begun to wait. ``queue.Queue`` can't be put into where an object ends: that may be within its own lock.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Any thread puts, also from where an object ends; one takes."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._bell = threading.Lock()
        """Open once something was put. It may be though all was taken: then one looks once for nothing."""
        self._bell.acquire()

    def put(self, item: T) -> None:
        self._items.append(item)
        with suppress(RuntimeError):  # it has been rung already
            self._bell.release()

    def take(self, wait_s: float | None = 0.0) -> T:
        """The oldest item; waits up to ``wait_s`` for one, with ``None`` however long. Raises ``queue.Empty``."""
        deadline_s = None if wait_s is None else time.monotonic() + wait_s
        while True:
            with suppress(IndexError):
                return self._items.popleft()
            left_s = -1.0 if deadline_s is None else deadline_s - time.monotonic()
            if deadline_s is not None and left_s <= 0:
                raise queue.Empty
            self._bell.acquire(timeout=left_s)
