"""A limit on how often something may be done: a token bucket."""

from __future__ import annotations

import time
from collections.abc import Callable

from shoal.config import RateConfig

TOLD = RateConfig(per_s=1.0, burst=20)
"""For what is logged of each of many: whoever fails without end doesn't fill a disk. All are counted."""


class RateLimit:
    """``burst`` at once, ``per_s`` on average. ``clock`` is monotonic seconds. Belongs to one thread."""

    def __init__(self, config: RateConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._level = float(config.burst)
        self._filled_s = clock()

    @property
    def wait_s(self) -> float:
        """How long until one more is allowed; 0 if it is now."""
        self._fill()
        return max(0.0, 1 - self._level) / self._config.per_s

    def take(self) -> bool:
        """Whether it may be done now; if so, it counts as done."""
        self._fill()
        if self._level < 1:
            return False
        self._level -= 1
        return True

    def book(self, within_s: float) -> float | None:
        """How long until it may be done; it counts as done, and who books first comes first.

        ``None``, and nothing counts, if that's longer than ``within_s``.
        """
        wait_s = self.wait_s
        if wait_s > within_s:
            return None
        self._level -= 1
        return wait_s

    def _fill(self) -> None:
        now_s = self._clock()
        self._level = min(self._config.burst, self._level + (now_s - self._filled_s) * self._config.per_s)
        self._filled_s = now_s
