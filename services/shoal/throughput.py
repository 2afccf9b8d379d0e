"""How much gets done in a second, of late: what a queue is divided by to say how long it takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

_WINDOW_S = 30.0
_LEAST_SEEN = 8
"""Fewer things say little: they may have been begun long before, or all at once."""
_MOST_S = 3600.0


class Throughput:
    """Only time counts in which it is measured: while there is more to do than can be done at once. What was longer ago
    counts for less. ``clock`` is monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._is_measured = False
        self._seen_s = clock()
        self._seconds = 0.0
        self._amount = 0.0
        self._num_seen = 0

    def measure(self, is_measured: bool) -> None:
        """From now on, or from now on not."""
        self._fade()
        self._is_measured = is_measured

    def done(self, amount: float) -> None:
        """Something that large is finished; 0 if it came to nothing."""
        self._fade()
        if self._is_measured:
            self._amount += amount
            self._num_seen += 1

    def seconds_for(self, amount: float) -> float | None:
        """How long so much takes, an hour at most; ``None`` as long as too little was seen."""
        self._fade()
        if self._num_seen < _LEAST_SEEN:
            return None
        return min(_MOST_S, amount * self._seconds / self._amount) if self._amount else _MOST_S

    def _fade(self) -> None:
        now_s = self._clock()
        if self._is_measured:
            kept = math.exp(-(now_s - self._seen_s) / _WINDOW_S)
            self._amount *= kept
            self._seconds = self._seconds * kept + _WINDOW_S * (1 - kept)
        self._seen_s = now_s
