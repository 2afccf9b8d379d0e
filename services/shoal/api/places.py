"""How many are here at once, and how long it takes until one of them leaves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shoal.api.throughput import Throughput


class Places:
    """Counts who is here; whoever asks decides how many may be. ``clock`` is monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_taken = 0
        self._throughput = Throughput(clock)

    def wait_s(self, num: int = 1) -> float:
        """How long it takes, of late, until so many have left; a second each if nobody knows."""
        known = self._throughput.seconds_each
        return num * (1.0 if known is None else known)

    @contextmanager
    def taken(self, num: int = 1, *, ran: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """For the block. ``ran`` is asked at its end: who was sent away says nothing of how long the others take."""
        self.num_taken += num
        self._throughput.measure(self.num_taken > 0)
        try:
            yield
        finally:
            self.num_taken -= num
            for _ in range(num if ran() else 0):
                self._throughput.done()
            self._throughput.measure(self.num_taken > 0)
