"""Who is let in, over a pool of which everything is known: so many places, and how long each request takes."""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace

import pytest

from fake_clock import FakeClock
from shoal.decode.admission import Admission, Admitted
from shoal.errors import DeadlineExceeded, Overloaded
from shoal.messages import Depth, GenerateRequest, RequestContext, Resumption, SamplingParams, SentChoice

NUM_PLACES = 4
TIMEOUT_S = 3.0
NUM_TOKENS = 50
REQUEST = GenerateRequest(
    RequestContext("one", TIMEOUT_S), "tiny", (1,) * NUM_TOKENS, Depth.SHALLOW, SamplingParams(max_tokens=NUM_TOKENS)
)


@dataclass
class Open:
    """One that was let in, and is due at that time."""

    due_s: float
    counted: AbstractContextManager[Admitted]
    admitted: Admitted
    began_s: float = math.inf
    is_over: bool = False


@dataclass
class Pool:
    """``NUM_PLACES`` requests run at once, first come first served, each for a second; the others wait. Who is late is
    given up, even amid its answer. Without ``is_seen``, they wait where decode doesn't see it: for prefill."""

    sheds: bool = True
    is_seen: bool = True
    now_s: float = 0.0
    num_done: int = 0
    num_late: int = 0
    refusals: list[Overloaded] = field(default_factory=list)
    waiting: deque[Open] = field(default_factory=deque)
    running: list[tuple[float, int, Open]] = field(default_factory=list)
    due: deque[Open] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.admission = Admission(lambda: self.now_s)

    def come(self, request: GenerateRequest = REQUEST) -> None:
        counted = self.admission.admitted(request) if self.sheds else nullcontext(Admitted(0, 0, 0))
        try:
            admitted = counted.__enter__()
        except Overloaded as error:
            self.refusals.append(error)
            return
        one = Open(self.now_s + request.context.timeout_s, counted, admitted)
        self.due.append(one)
        self.waiting.append(one)
        self._fill()

    def go_to(self, now_s: float) -> None:
        """All that happens until then."""
        while True:
            ended_s = self.running[0][0] if self.running else now_s + 1
            due_s = self.due[0].due_s if self.due else now_s + 1
            if min(ended_s, due_s) > now_s:
                break
            if ended_s <= due_s:
                self.now_s, _, one = heapq.heappop(self.running)
                self._end(one, None)
            else:
                one = self.due.popleft()
                self.now_s = one.due_s
                if not one.is_over:
                    self._end(one, DeadlineExceeded("late"))
            self._fill()
        self.now_s = now_s

    def _end(self, one: Open, error: DeadlineExceeded | None) -> None:
        if one.is_over:
            return
        one.is_over = True
        self.num_done += error is None
        self.num_late += error is not None
        one.admitted.num_sent = max(0, round(NUM_TOKENS * (self.now_s - one.began_s)))
        with suppress(DeadlineExceeded):
            one.counted.__exit__(None if error is None else DeadlineExceeded, error, None)
        self.running = [item for item in self.running if item[2] is not one]
        heapq.heapify(self.running)

    def _fill(self) -> None:
        while self.waiting and len(self.running) < NUM_PLACES:
            one = self.waiting.popleft()
            if not one.is_over:
                one.began_s = self.now_s
                heapq.heappush(self.running, (self.now_s + 1.0, id(one), one))
        self.admission.told_of_queue(sum(not one.is_over for one in self.waiting) if self.is_seen else 0)


def run(pool: Pool, load: float, seconds: float, seed: int = 0, num_tenants: int = 1) -> tuple[float, float]:
    """How many were done in time, and how many too late, each as a share of what the pool can do in that time."""
    chance = random.Random(seed)
    end_s, next_s = pool.now_s + seconds, pool.now_s
    done, late = pool.num_done, pool.num_late
    while (next_s := next_s + chance.expovariate(load * NUM_PLACES)) < end_s:
        pool.go_to(next_s)
        tenant = str(chance.randrange(num_tenants))
        pool.come(replace(REQUEST, context=replace(REQUEST.context, tenant=tenant)))
    pool.go_to(end_s)
    return (pool.num_done - done) / (seconds * NUM_PLACES), (pool.num_late - late) / (seconds * NUM_PLACES)


@pytest.mark.parametrize("num_tenants", [1, 2, 200])
@pytest.mark.parametrize("is_seen", [True, False])
@pytest.mark.parametrize("load", [2.0, 3.0, 10.0])
def test_however_much_is_asked_as_much_is_done_as_can_be(load: float, is_seen: bool, num_tenants: int):
    pool = Pool(is_seen=is_seen)
    run(pool, load, seconds=30, num_tenants=num_tenants)
    done, late = run(pool, load, seconds=300, num_tenants=num_tenants)
    assert done > 0.9 and late < 0.1


def test_without_it_hardly_anything_is_done_in_time():
    """So the pool above is one that would fail."""
    done, late = run(Pool(sheds=False), 3.0, seconds=300)
    assert done < 0.5 and late > 1.5


def test_who_can_be_served_is_never_refused():
    pool = Pool()
    done, late = run(pool, 0.5, seconds=300)
    assert not pool.refusals and late < 0.01 and done == pytest.approx(0.5, rel=0.1)


def test_after_an_overload_all_are_let_in_again():
    pool = Pool()
    run(pool, 3.0, seconds=60)
    pool.go_to(pool.now_s + 600)
    pool.refusals.clear()
    run(pool, 0.5, seconds=120)
    assert not pool.refusals


def test_what_was_slow_once_is_not_held_against_who_comes_when_nobody_waits():
    pool = Pool()
    run(pool, 3.0, seconds=60)
    pool.go_to(pool.now_s + 60)
    num_refused = len(pool.refusals)
    pool.come()
    pool.come(replace(REQUEST, prompt_token_ids=(1,) * 10_000))
    assert len(pool.refusals) == num_refused


def test_one_that_is_refused_is_told_when_it_would_have_been_taken():
    pool = Pool()
    run(pool, 3.0, seconds=60)
    told = [error.retry_after_s for error in pool.refusals if error.retry_after_s is not None]
    assert len(told) == len(pool.refusals) > 100
    assert all(0 < seconds < TIMEOUT_S for seconds in told)
    assert "about" in str(pool.refusals[-1])


def test_who_has_more_time_is_still_let_in():
    pool = Pool()
    run(pool, 3.0, seconds=60)
    num_refused = len(pool.refusals)
    pool.come(replace(REQUEST, context=replace(REQUEST.context, timeout_s=60)))
    assert len(pool.refusals) == num_refused


def test_who_has_more_time_lets_others_pass():
    """As the engine does: the earliest deadline comes first."""
    pool = Pool()
    run(pool, 3.0, seconds=60)
    pool.go_to(pool.now_s + 10)
    patient = replace(REQUEST, context=replace(REQUEST.context, timeout_s=600))
    for _ in range(100):
        pool.come(patient)
    num_refused = len(pool.refusals)
    pool.come(replace(REQUEST, context=replace(REQUEST.context, tenant="another")))
    assert len(pool.refusals) == num_refused


def test_who_has_sent_some_is_let_in_whatever_comes():
    pool = Pool()
    run(pool, 10.0, seconds=60)
    hurried = replace(REQUEST, context=replace(REQUEST.context, timeout_s=0.1))
    num_refused = len(pool.refusals)
    pool.come(replace(hurried, resumption=Resumption("plan", (SentChoice((1,)),))))
    assert len(pool.refusals) == num_refused
    pool.come(hurried)
    assert len(pool.refusals) == num_refused + 1


def test_who_has_hardly_any_time_shuts_nobody_out():
    admission = Admission(lambda: 0.0)
    hurried = replace(REQUEST, context=replace(REQUEST.context, timeout_s=0.01))
    with admission.admitted(REQUEST):
        for _ in range(20):
            with pytest.raises(DeadlineExceeded), admission.admitted(hurried):
                raise DeadlineExceeded("late")
        with admission.admitted(REQUEST):
            pass


def _too_late(admission: Admission, clock: FakeClock, request: GenerateRequest, num_sent: int) -> None:
    """If it's let in, it gets so far, and no further."""
    with suppress(DeadlineExceeded, Overloaded), admission.admitted(request) as one:
        clock.now_s += request.context.timeout_s
        one.num_sent = num_sent
        raise DeadlineExceeded("late")


def _done(admission: Admission) -> None:
    with admission.admitted(REQUEST) as one:
        one.num_sent = NUM_TOKENS


@pytest.mark.parametrize("num_sent", [0, 1, 100])
def test_a_tenant_who_asks_for_what_can_not_be_done_shuts_no_other_out(num_sent: int):
    clock = FakeClock()
    admission = Admission(clock.time)
    asks = replace(REQUEST.context, tenant="greedy", timeout_s=1.0)
    greedy = replace(REQUEST, context=asks, prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=8000))
    with admission.admitted(REQUEST):
        for _ in range(20):
            _too_late(admission, clock, greedy, num_sent)
        with suppress(Overloaded), admission.admitted(greedy):
            pass
        _done(admission)


def test_what_was_computed_counts_though_it_came_too_late():
    """A few who ask for too much make the pool no slower than it is: who can be served is."""
    clock = FakeClock()
    admission = Admission(clock.time)
    endless = replace(
        REQUEST, context=replace(REQUEST.context, timeout_s=1.0), sampling=SamplingParams(max_tokens=8000)
    )
    with admission.admitted(REQUEST):
        for _ in range(20):
            _too_late(admission, clock, endless, num_sent=100)
        _done(admission)
        with pytest.raises(Overloaded), admission.admitted(endless):
            pass


def test_all_that_is_here_drains_at_the_measured_rate():
    pool = Pool()
    assert pool.admission.drain_s is None
    run(pool, 3.0, seconds=60)
    drain_s = pool.admission.drain_s
    num_here = len(pool.running) + sum(not one.is_over for one in pool.waiting)
    assert drain_s == pytest.approx(num_here / NUM_PLACES, rel=0.3)


def test_an_answer_is_expected_to_be_as_long_as_answers_are():
    admission = Admission(lambda: 0.0)
    short = replace(REQUEST, sampling=SamplingParams(max_tokens=1000, num_choices=2))
    assert admission._expected(short) == 2050
    assert admission._expected(replace(short, sampling=replace(short.sampling, may_shorten=True))) == 50
    for _ in range(100):
        with admission.admitted(short) as one:
            one.num_sent = 40
    assert admission._expected(short) == pytest.approx(50 + 40)
    assert admission._expected(replace(short, sampling=SamplingParams(max_tokens=3))) == 53
