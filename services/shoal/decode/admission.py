"""Who is let in: nobody who would be done too late, as things have gone of late.

More requests than can be served before their deadlines would all be worked on, and none would be done in time. By
Little's law, one that comes now takes as long as all that is here, itself included, takes at the rate at which things
get done; if that's longer than it may take, it is told so at once, and when to come back. Nothing takes longer than it
may: then it is given up.

All that only while there is more to do than can be done: while some wait for a place; and, for a tenant, for a while
after one of its own was refused or came too late, so that nobody's hopeless requests shut others out; for all, where
that happens to several. What was slow says nothing of a time in which nobody waits, nor does a request that has hardly
any time of its own. The rate is of all tokens of which an answer came, also of one that was given up in the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shoal.errors import DeadlineExceeded, Overloaded
from shoal.messages import GenerateRequest, RequestContext
from shoal.throughput import Throughput

_SHORT_S = 5.0
_MANY = 3
"""So many tenants whose requests are late aren't one that asks for too much: there is too much to do."""
_LEAST_S = 1.0
"""Who may take less than that, and is too late, says nothing of how much there is to do."""
_SURE = 0.75
"""So much of its time may an estimate be; one that were as long as it may be would be too short half of the time."""
_NEWEST = 0.1
"""The weight of the last answer in the usual length."""


@dataclass(slots=True, eq=False)
class Admitted:
    """An open request that is expected to be ``num_tokens`` of work, may take ``timeout_s``, and is given up at
    ``due_s``; ``num_sent`` tokens were generated for it so far."""

    num_tokens: float
    timeout_s: float
    due_s: float
    num_sent: int = 0


class Admission:
    """Of one decode replica; belongs to its event loop. ``clock`` is monotonic seconds. Work is counted in tokens."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._throughput = Throughput(clock)
        self._open: set[Admitted] = set()
        self._usual_answer_tokens: float | None = None
        self._is_queue = False
        self._short_until_s: dict[str, float] = {}  # of each tenant

    @property
    def drain_s(self) -> float | None:
        """How long all that is here takes; ``None`` if nobody knows."""
        return self._takes_s(self._open)

    def told_of_queue(self, num_waiting: int) -> None:
        """How many wait for a place now."""
        self._is_queue = num_waiting > 0
        self._measure()

    @contextmanager
    def admitted(self, request: GenerateRequest) -> Iterator[Admitted]:
        """Count a request for as long as the block lasts.

        Raises Overloaded for one that would be too late; never if nobody waits, nor if some of its answer was sent.
        """
        timeout_s = request.context.timeout_s
        one = Admitted(self._expected(request), timeout_s, self._clock() + timeout_s)
        if self._is_short(request.context.tenant) and self._open and request.resumption is None:
            self._refuse_late(request.context, one)
        self._open.add(one)
        self._measure()
        try:
            yield one
        except DeadlineExceeded:
            self._note_shortage(request.context)
            raise
        else:
            self._note_length(one.num_sent / request.sampling.num_choices)
        finally:
            self._open.remove(one)
            if one.num_sent:
                self._throughput.done(len(request.prompt_token_ids) + one.num_sent)
            self._measure()

    def _refuse_late(self, context: RequestContext, one: Admitted) -> None:
        ahead = [other for other in self._open if other.due_s <= one.due_s]  # what has more time lets it pass
        takes_s = self._takes_s([one, *ahead])
        if takes_s is None or takes_s <= _SURE * one.timeout_s:
            return
        self._note_shortage(context)
        # Whatever is ahead is done or given up by then.
        gone_s = max((other.due_s for other in ahead), default=one.due_s) - self._clock()
        raise Overloaded(
            f"it would take about {takes_s:.1f} s, too long for its {one.timeout_s:.1f} s: too much is asked at once",
            retry_after_s=min(takes_s - _SURE * one.timeout_s, gone_s),
        )

    def _takes_s(self, some: Iterable[Admitted]) -> float | None:
        token_s = self._throughput.seconds_for(1.0)
        if token_s is None:
            return None
        return sum(min(one.num_tokens * token_s, one.timeout_s) for one in some)

    def _expected(self, request: GenerateRequest) -> float:
        """Answers are seldom as long as they may be."""
        sampling, usual = request.sampling, self._usual_answer_tokens
        if usual is None:
            usual = 0.0 if sampling.may_shorten else sampling.max_tokens
        return len(request.prompt_token_ids) + sampling.num_choices * min(sampling.max_tokens, usual)

    def _note_length(self, num_tokens: float) -> None:
        usual = self._usual_answer_tokens
        self._usual_answer_tokens = num_tokens if usual is None else usual + _NEWEST * (num_tokens - usual)

    def _is_short(self, tenant: str) -> bool:
        self._measure()  # which forgets whose time is over
        return self._is_queue or tenant in self._short_until_s or len(self._short_until_s) >= _MANY

    def _note_shortage(self, context: RequestContext) -> None:
        if context.timeout_s >= _LEAST_S:
            self._short_until_s[context.tenant] = self._clock() + _SHORT_S
            self._measure()

    def _measure(self) -> None:
        now_s = self._clock()
        self._short_until_s = {tenant: end_s for tenant, end_s in self._short_until_s.items() if now_s < end_s}
        self._throughput.measure((self._is_queue or bool(self._short_until_s)) and bool(self._open))
