"""When an engine leaves the cores to those who compute prompts for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shoal.engine.scheduler import Scheduler

LOOK_S = 0.02
"""How often it looks whether prompts are still on their way elsewhere: of that, nobody tells."""


@dataclass(frozen=True, slots=True)
class Yielding:
    """While prompts are on their way, ``pause_s`` seconds lie between the beginnings of two steps that only go on with
    answers. ``are_on_their_way`` is told whether some are to this engine, and says whether some are that count.
    """

    pause_s: float = 0.0
    are_on_their_way: Callable[[bool], bool] = bool

    def wait_s(self, scheduler: Scheduler, began_s: float, now_s: float) -> float:
        """How long to wait before the next step, or another look; the last one that computed began at ``began_s``."""
        if not self.pause_s or not self.are_on_their_way(bool(scheduler.reserved)) or not scheduler.only_goes_on(now_s):
            return 0.0
        return min(LOOK_S, max(0.0, began_s + self.pause_s - now_s))


NEVER = Yielding()
