"""Who is let in: nobody who would be done too late, as things are.

More requests than can be served before their deadlines would all be worked on, and none would be done in time. So it is
learned how much may be asked for at once. Each open request asks to be done within its time; together that is a demand,
in requests a second. One that met with a mean demand ``D``, and took ``x`` times the time that it had, shows that
``D / x`` can be borne: by Little's law, the rate at which things get done. That is a fact of the pool, wherever the
time goes to: a queue, prefill, or steps that are shared by many.

What a request took is counted for an answer of usual length, as each token took so long: so one that asks for more than
anybody could do in its time says nothing of the pool. Nor does one that would have been as slow alone. Until somebody
has met with too much, all are let in.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shoal.decode.tempo import Tempo
from shoal.errors import DeadlineExceeded, Overloaded
from shoal.wire.messages import GenerateRequest, SamplingParams

_SURE = 0.75
"""So much of its time may a request take; an estimate of all of it would be too short half of the time."""
_CROWDED = 1.25
"""Who takes so many times as long as alone does so for the others' sake."""
_SLACK = 0.8
"""Who took less than that doesn't tell how much more could have been borne."""
_LOWER, _RAISE = 0.2, 0.1
"""The weight of one request that met with too much, or with less than could be borne."""
_SHORT = 0.5
"""Who is done in so much of its time as things are needs no room."""
_LEAST_S = 1.0
"""Who may take less than that asks for no more, and says nothing of how much there is to do if it's too late."""
_EARLY = 16
"""After so many tokens one knows how it goes, long before the end."""


class _End(enum.Enum):
    DONE = enum.auto()
    LATE = enum.auto()
    CANCELLED = enum.auto()


class Admitted:
    """An open request; ``demand`` is what it asks for, in requests a second."""

    def __init__(self, admission: Admission, request: GenerateRequest, usual_tokens: float, now_s: float) -> None:
        self.num_choices = request.sampling.num_choices
        self.max_tokens = request.sampling.max_tokens
        self.num_prompt_tokens = len(request.prompt_token_ids)
        """Those that were computed, once that is known."""
        self.timeout_s = request.context.timeout_s
        self.demand = self.num_choices / (_SURE * max(_LEAST_S, self.timeout_s))
        self.usual_tokens = usual_tokens
        """Of an answer then."""
        self.began_s = now_s
        self.met_before = admission.met
        self.first_s: float | None = None
        self.num_sent = 0
        self._admission = admission

    def found(self, num_tokens: int) -> None:
        """So much of its prompt had been computed for another one, so it says nothing of how long prompts take."""
        self.num_prompt_tokens = max(1, self.num_prompt_tokens - num_tokens)

    def sent(self, num_tokens: int) -> None:
        """So many more tokens came, of all its choices."""
        self._admission.note_sent(self, num_tokens)

    @property
    def num_each(self) -> float:
        """Tokens of each choice."""
        return self.num_sent / self.num_choices


class Admission:
    """Of one decode replica; belongs to its event loop. ``clock`` is monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tempo = Tempo()
        self._open: set[Admitted] = set()
        self._bearable: float | None = None
        self._demand = 0.0
        self._seen_s = clock()
        self.met = 0.0
        """All demand so far, over time: of two values the difference is what somebody met with meanwhile."""

    @property
    def drain_s(self) -> float | None:
        """How long all that is here takes, as the last one does; ``None`` if nobody knows."""
        usual_tokens = self._tempo.usual_tokens
        return None if usual_tokens is None else self._tempo.now_s(usual_tokens)

    @contextmanager
    def admitted(self, request: GenerateRequest) -> Iterator[Admitted]:
        """Count a request for as long as the block lasts.

        Raises Overloaded for one that would be too late; never if it's alone, nor if some of its answer was sent.
        """
        one = Admitted(self, request, self._usual(request.sampling), self._look())
        if self._open and request.resumption is None:
            self._refuse_late(one)
        self._open.add(one)
        self._sum_up()
        end = _End.CANCELLED
        try:
            yield one
            end = _End.DONE
        except DeadlineExceeded:
            end = _End.LATE
            raise
        finally:
            try:
                self._look()
                self._note_end(one, end)
            finally:
                self._open.remove(one)
                self._sum_up()

    def note_sent(self, one: Admitted, num_tokens: int) -> None:
        """Of each output: nothing is summed up here."""
        if one.first_s is None:
            one.first_s = self._look()
            self._tempo.began(one.first_s - one.began_s, one.num_prompt_tokens)
        before, one.num_sent = one.num_each, one.num_sent + num_tokens
        if before < _EARLY <= one.num_each:
            self._look()
            self._note_further(one)
            self._learn(one, is_late=False)

    def _usual(self, sampling: SamplingParams) -> float:
        """Tokens of a choice. Answers are seldom as long as they may be."""
        usual = self._tempo.usual_tokens
        if usual is None:
            return 0.0 if sampling.may_shorten else sampling.max_tokens
        return usual

    def _refuse_late(self, one: Admitted) -> None:
        tempo, excess = self._tempo, self._demand + one.demand
        num_tokens = min(one.max_tokens, one.usual_tokens)
        further_s, alone_s = tempo.further_s(num_tokens), tempo.alone_s(0, num_tokens)
        is_late = tempo.knows_best and further_s > max(one.timeout_s, _CROWDED * alone_s)
        if self._bearable is not None:
            excess -= self._bearable
            is_short = tempo.now_s(num_tokens) <= _SHORT * _SURE * one.timeout_s
            is_late = is_late or (excess > 0 and not is_short)
        if not is_late:
            return
        # Of what is too much, so much is done by then; and whatever is here is done or given up.
        wait_s = _SURE * one.timeout_s * max(excess, one.demand) / (self._bearable or self._demand)
        gone_s = max(other.began_s + other.timeout_s for other in self._open) - self._seen_s
        raise Overloaded(
            f"it would take longer than its {one.timeout_s:.1f} s: too much is asked at once",
            retry_after_s=max(0.0, min(wait_s, gone_s)),
        )

    def _note_end(self, one: Admitted, end: _End) -> None:
        self._note_further(one)
        if end is _End.LATE and one.first_s is None:
            self._tempo.waited(self._seen_s - one.began_s)
        if (length := self._length(one, end)) is not None:
            self._tempo.ended(length)
        if end is _End.LATE or one.first_s is not None:
            self._learn(one, is_late=end is _End.LATE)

    def _length(self, one: Admitted, end: _End) -> float | None:
        """Of its answer. What isn't complete would have been longer: as long as it might have been, if that is no more
        than can be done in its time."""
        if end is _End.DONE:
            return one.num_each
        if end is _End.LATE and self._tempo.knows_best:
            if self._tempo.alone_s(one.num_prompt_tokens, one.max_tokens) <= one.timeout_s:
                return one.max_tokens
            if one.num_each > one.usual_tokens:
                return one.num_each
        return None

    def _note_further(self, one: Admitted) -> None:
        if one.first_s is not None and one.num_each > 1:
            self._tempo.went_on(self._seen_s - one.first_s, one.num_each - 1)

    def _learn(self, one: Admitted, *, is_late: bool) -> None:
        """How much can be borne, by what ``one`` met with."""
        here_s = self._seen_s - one.began_s
        if here_s <= 0 or one.timeout_s <= 0:
            return
        num_tokens = max(one.usual_tokens, one.num_each) if is_late else one.usual_tokens
        first_s = here_s if one.first_s is None else one.first_s - one.began_s
        took_s = first_s + self._tempo.further_s(num_tokens)
        took = took_s / (_SURE * one.timeout_s)
        met = (self.met - one.met_before) / here_s
        bearable = self._bearable
        if took < 1:
            could = (met + one.demand) / max(took, _SLACK)
            if bearable is not None and could > bearable:
                self._bearable = bearable + _RAISE * (could - bearable)
        elif one.timeout_s >= _LEAST_S and took_s > _CROWDED * self._tempo.alone_s(one.num_prompt_tokens, num_tokens):
            could = met / took
            self._bearable = could if bearable is None else bearable + _LOWER * min(0.0, could - bearable)

    def _sum_up(self) -> None:
        """As of the last look."""
        self._demand = sum(one.demand for one in self._open)

    def _look(self) -> float:
        """The time now, up to which demand is counted."""
        now_s = self._clock()
        self.met += self._demand * (now_s - self._seen_s)
        self._seen_s = now_s
        return now_s
