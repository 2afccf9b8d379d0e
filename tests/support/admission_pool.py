"""A pool of which everything is known, and who asks it: what comes in time is a matter of who is let in."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field

from shoal.decode.admission import Admission
from shoal.errors import DeadlineExceeded, Overloaded
from shoal.wire.messages import Depth, GenerateRequest, RequestContext, SamplingParams

STEP_S = 0.05


def asking(
    timeout_s: float, *, num_prompt_tokens: int = 1, max_tokens: int = 150, may_shorten: bool = False
) -> GenerateRequest:
    return GenerateRequest(
        RequestContext("one", timeout_s),
        "tiny",
        (1,) * num_prompt_tokens,
        Depth.SHALLOW,
        SamplingParams(max_tokens=max_tokens, may_shorten=may_shorten),
    )


class Counted:
    """Whom nobody counts."""

    def sent(self, num_tokens: int) -> None:
        pass


@dataclass
class Open:
    kind: str
    due_s: float
    counted: AbstractContextManager[Counted]
    admitted: Counted
    num_prompt_left: float
    num_tokens: float
    num_left: float
    num_sent: int = 0


@dataclass
class Tally:
    done: int = 0
    late: int = 0
    refusals: list[Overloaded] = field(default_factory=list)


@dataclass
class Pool:
    """``num_places`` requests run at once, those due first; the others wait. Each gets ``alone`` tokens a second, as
    long as all together get no more than ``together``. A token of the prompt costs ``prompt_cost`` of one of the
    answer. Who is late is given up, even amid its answer. Without ``sheds``, all are let in."""

    together: float = 1000.0
    alone: float = 100.0
    num_places: int = 64
    prompt_cost: float = 0.05
    sheds: bool = True
    now_s: float = 0.0
    here: list[Open] = field(default_factory=list)
    tallies: dict[str, Tally] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.admission = Admission(lambda: self.now_s)

    def of(self, kind: str = "one") -> Tally:
        return self.tallies.setdefault(kind, Tally())

    def come(self, request: GenerateRequest, num_tokens: float, kind: str = "one") -> None:
        """A request whose answer is, if nobody cuts it, so long."""
        counted = self.admission.admitted(request) if self.sheds else nullcontext(Counted())
        try:
            admitted = counted.__enter__()
        except Overloaded as error:
            self.of(kind).refusals.append(error)
            return
        prompt = len(request.prompt_token_ids) * self.prompt_cost
        due_s = self.now_s + request.context.timeout_s
        self.here.append(Open(kind, due_s, counted, admitted, prompt, num_tokens, num_tokens))
        self.here.sort(key=lambda one: one.due_s)

    def step(self) -> None:
        self.now_s += STEP_S
        running = self.here[: self.num_places]
        for one in running:
            self._go_on(one, min(self.alone, self.together / len(running)) * STEP_S)
        for one in list(self.here):
            if one.num_left <= 0:
                self._end(one, None)
            elif self.now_s >= one.due_s:
                self._end(one, DeadlineExceeded("late"))

    def _go_on(self, one: Open, work: float) -> None:
        of_prompt = min(work, one.num_prompt_left)
        one.num_prompt_left -= of_prompt
        one.num_left -= work - of_prompt
        num_sent = int(one.num_tokens - max(0.0, one.num_left))
        if num_sent > one.num_sent:
            one.admitted.sent(num_sent - one.num_sent)
            one.num_sent = num_sent

    def _end(self, one: Open, error: DeadlineExceeded | None) -> None:
        self.here.remove(one)
        tally = self.of(one.kind)
        tally.done += error is None
        tally.late += error is not None
        with suppress(DeadlineExceeded):
            one.counted.__exit__(None if error is None else DeadlineExceeded, error, None)


@dataclass(frozen=True)
class Source:
    """Requests that come by chance, ``rate`` a second."""

    rate: float
    request: GenerateRequest
    num_tokens: Callable[[random.Random], float]
    kind: str = "one"


def run(pool: Pool, seconds: float, *sources: Source, seed: int = 0) -> None:
    chance = random.Random(seed)
    end_s = pool.now_s + seconds
    nexts = [pool.now_s + chance.expovariate(source.rate) for source in sources]
    while pool.now_s < end_s:
        pool.step()
        for index, source in enumerate(sources):
            while nexts[index] <= pool.now_s:
                pool.come(source.request, source.num_tokens(chance), source.kind)
                nexts[index] += chance.expovariate(source.rate)


def measured(pool: Pool, seconds: float, *sources: Source) -> dict[str, Tally]:
    """What came of those that ended in ``seconds``, after a minute of the same."""
    run(pool, 60.0, *sources)
    pool.tallies = {}
    run(pool, seconds, *sources, seed=1)
    return pool.tallies
