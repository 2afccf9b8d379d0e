"""Which way a prompt takes to its first token: over the prefill pool, or all of it by decode, and why.

What is planned is here; where prefill fails, the ladder says who goes on (ladder.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from shoal.config import HandoffConfig
from shoal.model.plan import LayerPlan
from shoal.telemetry.labels import PromptWay
from shoal.wire.messages import Depth, GenerateRequest

LOOK_S = 0.25
"""How often who waits for a busy prefill looks whether this replica has become idle."""


class Work:
    """A request's share in what its replica computes."""

    def __init__(self) -> None:
        self.has_begun = False

    def begin(self) -> None:
        """From now on steps are for it, too. Twice is a no-op."""
        self.has_begun = True


class Ways:
    """Of one decode replica. Prefill is too busy for a prompt of which nothing has come after ``config.busy_after_s``;
    with ``None`` it never is."""

    def __init__(self, plan: LayerPlan, config: HandoffConfig) -> None:
        self._plan = plan
        self._config = config
        self._work: set[Work] = set()

    @contextmanager
    def work(self) -> Iterator[Work]:
        """A request's life here; it waits for others until its work begins."""
        work = Work()
        self._work.add(work)
        try:
            yield work
        finally:
            self._work.discard(work)

    def shallow_tokens(self, request: GenerateRequest) -> range:
        return self._plan.shallow_tokens(len(request.prompt_token_ids), request.depth, request.outline)

    def depth_run(self, request: GenerateRequest) -> Depth:
        """Shallow only if some token is: not for a one-token prompt, nor in a plan that skips nothing."""
        return Depth.SHALLOW if self.shallow_tokens(request) else Depth.FULL

    def of(self, request: GenerateRequest) -> PromptWay:
        """HANDED_OFF, unless the prompt isn't for the prefill pool. With nothing skipped, both depths are one."""
        if request.sampling.num_prompt_logprobs is not None:
            return PromptWay.PROMPT_LOGPROBS  # only decode has an lm_head
        if not self._plan.num_skipped:
            num_won = len(request.prompt_token_ids) - 1
        else:
            # Anchors and boundary tokens decode runs itself: the others are what is won.
            num_won = len(self.shallow_tokens(request))
            if not num_won and request.depth is Depth.FULL:
                return PromptWay.FULL_DEPTH
        return PromptWay.HANDED_OFF if num_won and num_won + 1 >= self._config.min_tokens else PromptWay.SHORT

    def is_soon_done(self, request: GenerateRequest, num_present: int) -> bool:
        """Prefill would compute all of the prompt again; what is left of it may be less work here."""
        num_left = len(request.prompt_token_ids) - 1 - num_present
        return num_left <= min(num_present, self._config.local_tokens)

    def is_better_here(self, waited_s: float) -> bool:
        """Whether a prompt of which nothing has come for so long is sooner done by this replica, which idles."""
        after_s = self._config.busy_after_s
        is_busy = after_s is not None and waited_s >= after_s
        return is_busy and not any(work.has_begun for work in self._work)

    def look_s(self, waited_s: float) -> float:
        """When to look next whether it is, in seconds."""
        after_s = self._config.busy_after_s
        return math.inf if after_s is None else max(after_s - waited_s, LOOK_S)
