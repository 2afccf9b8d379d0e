"""How long one after the other takes, of late: the inverse of a throughput."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

_WINDOW_S = 30.0
_LEAST_SEEN = 8
"""Fewer say little: they may have been begun long before, or all at once."""
_MOST_S = 3600.0


class Throughput:
    """Only time counts in which it is measured: while there is something to do. What was longer ago counts for less.
    ``clock`` is monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._is_measured = False
        self._seen_s = clock()
        self._seconds = 0.0
        self._num_done = 0.0  # of late, so it's no whole number
        self._num_seen = 0

    def measure(self, is_measured: bool) -> None:
        """From now on, or from now on not."""
        self._fade()
        self._is_measured = is_measured

    def done(self) -> None:
        """One more is finished."""
        self._fade()
        if self._is_measured:
            self._num_done += 1
            self._num_seen += 1

    @property
    def seconds_each(self) -> float | None:
        """An hour at most; ``None`` as long as too few were seen."""
        self._fade()
        if self._num_seen < _LEAST_SEEN:
            return None
        return min(_MOST_S, self._seconds / self._num_done) if self._num_done else _MOST_S

    def _fade(self) -> None:
        now_s = self._clock()
        if self._is_measured:
            kept = math.exp(-(now_s - self._seen_s) / _WINDOW_S)
            self._num_done *= kept
            self._seconds = self._seconds * kept + _WINDOW_S * (1 - kept)
        self._seen_s = now_s
