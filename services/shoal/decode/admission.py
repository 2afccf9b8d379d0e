"""Who is let in: nobody who would be done too late, as things have gone of late.

More requests than can be served before their deadlines would all be worked on, and none would be done in time. By
Little's law, one that comes now takes as long as all that is here, itself included, takes at the rate at which things
get done; if that's longer than it may take, it is told so at once, and when to come back.

All that only while there is more to do than can be done: while some wait for a place, and for a while after one was
refused or came too late. What was slow then says nothing of a time in which nobody waits, nor does a request that has
hardly any time of its own: a few of those would shut everybody else out. The rate is of what was answered; what was
given up was no use to anybody.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shoal.errors import DeadlineExceeded, Overloaded
from shoal.messages import GenerateRequest
from shoal.throughput import Throughput

_SHORT_S = 5.0
_LEAST_S = 1.0
"""Who may take less than that, and is too late, says nothing of how much there is to do."""
_NEWEST = 0.1
"""The weight of the last answer in the usual length."""


@dataclass(slots=True)
class Admitted:
    """An open request; ``num_sent`` tokens were generated for it so far."""

    num_sent: int = 0


class Admission:
    """Of one decode replica; belongs to its event loop. ``clock`` is monotonic seconds. Work is counted in tokens."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._throughput = Throughput(clock)
        self._num_open = 0
        self._num_tokens = 0.0
        self._usual_answer_tokens: float | None = None
        self._is_queue = False
        self._short_until_s = -math.inf

    @property
    def drain_s(self) -> float | None:
        """How long all that is here takes; ``None`` if nobody knows."""
        return self._throughput.seconds_for(self._num_tokens)

    @property
    def _is_short(self) -> bool:
        return self._is_queue or self._clock() < self._short_until_s

    def told_of_queue(self, num_waiting: int) -> None:
        """How many wait for a place now."""
        self._is_queue = num_waiting > 0
        self._measure()

    @contextmanager
    def admitted(self, request: GenerateRequest) -> Iterator[Admitted]:
        """Count a request for as long as the block lasts, and as done if it ends well.

        Raises Overloaded for one that would be too late; never if nobody waits, nor if some of its answer was sent.
        """
        num_tokens = self._expected(request)
        if self._is_short and self._num_open and request.resumption is None:
            self._refuse_late(num_tokens, request.context.timeout_s)
        self._num_open += 1
        self._num_tokens += num_tokens
        self._measure()
        one = Admitted()
        try:
            yield one
        except DeadlineExceeded:
            if request.context.timeout_s >= _LEAST_S:
                self._note_shortage()
                self._throughput.done(0)
            raise
        else:
            self._done(len(request.prompt_token_ids), one.num_sent / request.sampling.num_choices, one.num_sent)
        finally:
            self._num_open -= 1
            self._num_tokens -= num_tokens
            self._measure()

    def _refuse_late(self, num_tokens: float, timeout_s: float) -> None:
        takes_s = self._throughput.seconds_for(self._num_tokens + num_tokens)
        if takes_s is not None and takes_s > timeout_s:
            if timeout_s >= _LEAST_S:
                self._note_shortage()
            raise Overloaded(
                f"it would take about {takes_s:.0f} s, which is more than it may: too much is asked at once",
                retry_after_s=takes_s - timeout_s,
            )

    def _expected(self, request: GenerateRequest) -> float:
        """Answers are seldom as long as they may be."""
        sampling, usual = request.sampling, self._usual_answer_tokens
        if usual is None:
            usual = 0.0 if sampling.may_shorten else sampling.max_tokens
        return len(request.prompt_token_ids) + sampling.num_choices * min(sampling.max_tokens, usual)

    def _done(self, num_prompt_tokens: int, answer_tokens: float, num_sent: int) -> None:
        usual = self._usual_answer_tokens
        self._usual_answer_tokens = answer_tokens if usual is None else usual + _NEWEST * (answer_tokens - usual)
        self._throughput.done(num_prompt_tokens + num_sent)

    def _note_shortage(self) -> None:
        self._short_until_s = self._clock() + _SHORT_S
        self._measure()

    def _measure(self) -> None:
        self._throughput.measure(self._is_short and self._num_open > 0)
