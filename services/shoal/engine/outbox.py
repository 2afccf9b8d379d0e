"""What steps brought and the event loop isn't told yet: tokens in the midst of answers may wait for some more.

What a message costs on its way to a client hardly depends on how many tokens are in it, so that with many streams each
further step told by itself takes time that the next one would compute in.
"""

from __future__ import annotations

from shoal.engine.events import StepOutput

MAX_HELD_S = 0.1
"""Nothing waits for longer, if the next step takes as long as the last one."""


class Outbox:
    """Steps' outputs in their order, told ``interval`` at a time. Whatever can't wait takes along what was there."""

    def __init__(self, interval: int = 1) -> None:
        self._interval = interval
        self._held: list[StepOutput] = []
        self._is_due = False
        self._wanted_blocks = False

    @property
    def holds_back(self) -> bool:
        """Something is here that isn't due."""
        return bool(self._held) and not self._is_due

    def put(self, output: StepOutput) -> None:
        self._held.append(output)
        took_s = output.ended_s - output.started_s
        self._is_due = (
            self._is_due
            or len(self._held) >= self._interval
            or not output.can_wait
            or output.wants_blocks is not self._wanted_blocks
            or output.ended_s + took_s - self._held[0].ended_s >= MAX_HELD_S
        )
        self._wanted_blocks = output.wants_blocks

    def take(self) -> list[StepOutput]:
        """All that is here, if it's due."""
        return self.take_all() if self._is_due else []

    def take_all(self) -> list[StepOutput]:
        taken, self._held, self._is_due = self._held, [], False
        return taken
