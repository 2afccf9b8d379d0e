"""What follows a failed hand-off: another prefill replica, then a prefill by decode itself, then an error.

::

    attempt 1   a prefill replica           ─┐
    attempt 2   another one                  ├─ failed
    attempt 3   decode computes the prompt  ─┘  (always the last one left)
    then        UNAVAILABLE

No rung changes the depth. Each is behind a rate limit, so that a broken pool doesn't multiply its own load, and the
attempts are the request's: those that the gateway has made already count. If they leave a single one, it's decode's own
at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from shoal.config import HandoffConfig
from shoal.config.rate import RateLimit
from shoal.telemetry.labels import FallbackRung


class Ladder:
    """One decode replica's. Decides, and does nothing itself."""

    def __init__(self, config: HandoffConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_attempts = config.max_attempts
        self._other_replica = RateLimit(config.other_replica, clock)
        self._local = RateLimit(config.local, clock)

    def after(self, attempt: int, *, has_other_replica: bool) -> FallbackRung:
        """The rung to take when attempt number ``attempt`` (from 1) has failed."""
        num_left = self._max_attempts - attempt
        if num_left > 1 and has_other_replica and self._other_replica.take():
            return FallbackRung.OTHER_REPLICA
        if num_left > 0 and self._local.take():
            return FallbackRung.LOCAL
        return FallbackRung.UNAVAILABLE

    def is_at_its_end(self, attempt: int) -> bool:
        """Whether a request that comes with attempt number ``attempt``, after others elsewhere, has no rung left but
        decode's own, which it then takes. Not where that one's rate limit is reached, either."""
        return 1 < attempt >= self._max_attempts and self._local.take()

    @property
    def retry_after_s(self) -> float:
        """When a request that found no rung may come back (seconds)."""
        return max(1.0, self._local.wait_s)
