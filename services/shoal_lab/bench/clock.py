"""Time, passed in: tests have a clock that they move."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since some moment, never going back."""
        ...

    def cpu_s(self) -> float:
        """Seconds of one core that this process has used."""
        ...

    async def wait_until(self, moment_s: float) -> None:
        """Return when ``now`` has reached ``moment_s``; at once if it has. Other tasks run meanwhile in any case."""
        ...


class RealClock:
    """The loop's timers, and the clock they go by."""

    def now(self) -> float:
        return time.perf_counter()

    def cpu_s(self) -> float:
        return time.process_time()

    async def wait_until(self, moment_s: float) -> None:
        await asyncio.sleep(max(0.0, moment_s - self.now()))
