"""Who is let in, over a pool of which everything is known."""

from __future__ import annotations

import asyncio
import math
import random
from contextlib import suppress
from dataclasses import replace

import pytest
from admission_pool import Pool, Source, asking, measured, run, with_time
from fake_clock import FakeClock

from shoal.decode.admission import Admission
from shoal.errors import DeadlineExceeded, Overloaded
from shoal.wire.messages import Resumption, SentChoice

SECONDS = 120.0
NUM_TOKENS = 150
TIMEOUT_S = 10.0
REQUEST = asking(TIMEOUT_S, max_tokens=NUM_TOKENS)

POOLS = {
    # Each takes 1.5 s, alone or not, and the others wait.
    "queue": Pool(together=400.0, alone=100.0, num_places=4),
    # Ten are as fast as one, and all are slower if there are more.
    "batch": Pool(together=1000.0, alone=100.0),
    # Nearly all of the work is the prompt.
    "prompts": Pool(together=1000.0, alone=1000.0, prompt_cost=100.0),
}


def pool_like(name: str, *, sheds: bool = True) -> Pool:
    kind = POOLS[name]
    return Pool(kind.together, kind.alone, kind.num_places, kind.prompt_cost, sheds=sheds)


def capacity_of(pool: Pool) -> float:
    """Requests a second."""
    return pool.together / (NUM_TOKENS + pool.prompt_cost)


def load(pool: Pool, times: float) -> Source:
    return Source(times * capacity_of(pool), REQUEST, lambda _chance: NUM_TOKENS)


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("times", [2.0, 3.0, 10.0])
def test_however_much_is_asked_as_much_is_done_as_can_be(name: str, times: float):
    pool = pool_like(name)
    tally = measured(pool, SECONDS, load(pool, times))["one"]
    possible = capacity_of(pool) * SECONDS
    assert tally.done > 0.9 * possible and tally.late < 0.05 * possible


@pytest.mark.parametrize("name", POOLS)
def test_without_it_hardly_anything_is_done_in_time(name: str):
    """So those above are pools that would fail."""
    pool = pool_like(name, sheds=False)
    tally = measured(pool, SECONDS, load(pool, 3.0))["one"]
    assert tally.done < 0.5 * capacity_of(pool) * SECONDS and tally.late > tally.done


@pytest.mark.parametrize("name", POOLS)
def test_who_can_be_served_is_never_refused(name: str):
    pool = pool_like(name)
    tally = measured(pool, SECONDS, load(pool, 0.5))["one"]
    assert (
        not tally.refusals
        and not tally.late
        and tally.done == pytest.approx(0.5 * capacity_of(pool) * SECONDS, rel=0.2)
    )


@pytest.mark.parametrize("name", POOLS)
def test_when_too_much_begins_to_be_asked_it_shows_before_many_are_late(name: str):
    pool = pool_like(name)
    run(pool, 30.0, load(pool, 0.5))
    run(pool, 30.0, load(pool, 3.0))
    assert pool.of().late < 0.2 * 30.0 * 3.0 * capacity_of(pool)


@pytest.mark.parametrize("name", POOLS)
def test_after_an_overload_all_are_let_in_again(name: str):
    pool = pool_like(name)
    run(pool, 60.0, load(pool, 3.0))
    run(pool, 15.0, load(pool, 0.5))
    pool.tallies = {}
    run(pool, 60.0, load(pool, 0.5))
    assert not pool.of().refusals and not pool.of().late


def test_after_a_while_in_which_all_was_slow_all_are_let_in_again():
    pool = pool_like("batch")
    run(pool, 30.0, load(pool, 0.6))
    pool.together /= 4
    asked = load(pool, 2.4)
    run(pool, 30.0, asked)
    assert pool.of().refusals
    pool.together *= 4
    run(pool, 30.0, asked)
    pool.tallies = {}
    run(pool, 60.0, asked)
    assert not pool.of().refusals and not pool.of().late


@pytest.mark.parametrize("spread", [0.7, 1.2])
def test_answers_may_be_of_any_length(spread: float):
    """Those that are too late would have been longer than those that aren't."""

    def length(chance: random.Random) -> float:
        return min(2000.0, max(1.0, chance.lognormvariate(math.log(NUM_TOKENS) - spread**2 / 2, spread)))

    pool = pool_like("batch")
    asked = Source(3 * capacity_of(pool), asking(TIMEOUT_S, max_tokens=2000), length)
    tally = measured(pool, SECONDS, asked)["one"]
    assert tally.done > 0.9 * capacity_of(pool) * SECONDS and tally.late < 0.15 * tally.done


def test_short_answers_pass_and_of_long_ones_some_are_done():
    """Where all came, each of the long ones would be late."""
    pool = pool_like("batch")
    short = Source(20.0, asking(TIMEOUT_S, max_tokens=5), lambda _chance: 5, "short")
    long = Source(4.0, asking(TIMEOUT_S, max_tokens=600), lambda _chance: 600, "long")
    tallies = measured(pool, SECONDS, short, long)
    assert not tallies["short"].refusals and not tallies["short"].late
    possible = SECONDS * (pool.together - 20.0 * 5) / 600
    assert tallies["long"].done > 0.5 * possible and tallies["long"].late < 0.4 * possible


@pytest.mark.parametrize("timeout_s", [5.0, 6.0, 10.0])
@pytest.mark.parametrize("num_tokens", [200, 2000])
def test_who_asks_for_what_can_not_be_done_shuts_no_other_out(timeout_s: float, num_tokens: int):
    """The others take 4 s, alone or not."""
    pool = Pool(together=1000.0, alone=50.0)
    others = Source(3.0, asking(timeout_s, max_tokens=200), lambda _chance: 200, "others")
    hopeless = Source(0.5, asking(2.0, max_tokens=num_tokens), lambda _chance: num_tokens, "hopeless")
    tallies = measured(pool, SECONDS, others, hopeless)
    assert tallies["hopeless"].late > 0 and not tallies["hopeless"].done
    assert len(tallies["others"].refusals) < 0.03 * tallies["others"].done and not tallies["others"].late


def test_who_has_hardly_any_time_shuts_nobody_out():
    pool = pool_like("batch")
    hurried = Source(50.0, asking(0.02), lambda _chance: NUM_TOKENS, "hurried")
    tallies = measured(pool, SECONDS, load(pool, 0.5), hurried)
    assert not tallies["one"].refusals and not tallies["one"].late


@pytest.mark.parametrize("prompt_cost", [0.02, 0.2])
def test_long_prompts_that_are_let_in_leave_room_for_others(prompt_cost: float):
    pool = Pool(together=200.0, alone=40.0, num_places=16, prompt_cost=prompt_cost)
    chats = Source(3.75, asking(TIMEOUT_S, num_prompt_tokens=50), lambda _chance: NUM_TOKENS, "chat")
    documents = Source(0.1, asking(20.0, num_prompt_tokens=3000, max_tokens=20), lambda _chance: 20, "document")
    tallies = measured(pool, 2 * SECONDS, chats, documents)
    left = pool.together - 0.1 * (20 + 3000 * prompt_cost)
    assert tallies["chat"].done > 0.8 * 2 * SECONDS * left / (NUM_TOKENS + 50 * prompt_cost)
    assert tallies["chat"].late < 0.05 * tallies["chat"].done


def test_one_that_is_refused_is_told_when_to_come_again():
    pool = pool_like("batch")
    run(pool, 60.0, load(pool, 3.0))
    refusals = pool.of().refusals
    assert len(refusals) > 100
    assert all(one.retry_after_s is not None and 0 < one.retry_after_s < TIMEOUT_S for one in refusals)
    assert "too much is asked" in str(refusals[-1])


def test_who_has_more_time_is_still_let_in():
    pool = pool_like("batch")
    run(pool, 60.0, load(pool, 3.0))
    num_refused = len(pool.of().refusals)
    pool.come(with_time(REQUEST, 60.0), NUM_TOKENS)
    assert len(pool.of().refusals) == num_refused


def test_who_has_more_time_lets_others_pass():
    """As the engine does: the earliest deadline comes first."""
    pool = pool_like("queue")
    run(pool, 60.0, load(pool, 3.0))
    run(pool, TIMEOUT_S, load(pool, 0.001))
    pool.tallies = {}
    for _ in range(100):
        pool.come(with_time(REQUEST, 600.0), NUM_TOKENS, "patient")
    run(pool, 60.0, load(pool, 0.5))
    assert not pool.of().refusals and not pool.of().late and not pool.of("patient").refusals


def test_who_has_sent_some_is_let_in_whatever_comes():
    pool = pool_like("batch")
    run(pool, 60.0, load(pool, 10.0))
    num_refused = len(pool.of().refusals)
    while len(pool.of().refusals) == num_refused:  # it's full, to the last one
        pool.come(REQUEST, NUM_TOKENS)
    pool.come(replace(REQUEST, resumption=Resumption("plan", (SentChoice((1,)),))), NUM_TOKENS)
    assert len(pool.of().refusals) == num_refused + 1


def test_who_is_alone_is_let_in_however_late_others_were():
    clock = FakeClock()
    admission = Admission(clock.time)
    for _ in range(20):
        with suppress(DeadlineExceeded, Overloaded), admission.admitted(REQUEST), admission.admitted(REQUEST):
            clock.now_s += TIMEOUT_S
            raise DeadlineExceeded("late")
    with admission.admitted(REQUEST), pytest.raises(Overloaded), admission.admitted(REQUEST):
        pass


def test_who_leaves_amid_an_answer_tells_nothing_of_how_long_answers_are():
    clock = FakeClock()
    admission = Admission(clock.time)
    with admission.admitted(REQUEST) as one:
        one.sent(100)
    for error in (GeneratorExit, asyncio.CancelledError):
        with suppress(error), admission.admitted(REQUEST) as one:
            one.sent(1)
            raise error
    with admission.admitted(REQUEST) as one:
        assert one.usual_tokens == 100


def test_each_choice_is_an_answer():
    clock = FakeClock()
    admission = Admission(clock.time)
    two = replace(REQUEST, sampling=replace(REQUEST.sampling, num_choices=2))
    with admission.admitted(REQUEST) as one, admission.admitted(two) as both:
        assert both.demand == 2 * one.demand
        for _ in range(40):
            both.sent(2)
    with admission.admitted(REQUEST) as one:
        assert one.usual_tokens == 40


def test_until_an_answer_was_seen_it_is_as_long_as_was_asked_for():
    admission = Admission(lambda: 0.0)
    with admission.admitted(REQUEST) as one:
        assert one.usual_tokens == NUM_TOKENS
    with admission.admitted(asking(TIMEOUT_S, max_tokens=8000, may_shorten=True)) as one:
        assert one.usual_tokens == 0


def test_what_is_here_drains_as_answers_take_now():
    pool = pool_like("queue")
    assert pool.admission.drain_s is None
    run(pool, 60.0, load(pool, 3.0))
    rate = pool.num_places / (NUM_TOKENS / pool.alone)
    assert pool.admission.drain_s == pytest.approx(len(pool.here) / rate, rel=0.3)


def test_one_that_has_no_time_left_is_late_and_leaves_its_place():
    clock = FakeClock()
    admission = Admission(clock.time)
    with suppress(DeadlineExceeded), admission.admitted(with_time(REQUEST, 0.0)):
        clock.now_s += 0.1
        raise DeadlineExceeded("late")
    assert not admission._open and not admission._demand


def test_a_place_is_left_whatever_goes_wrong_in_what_is_learned(monkeypatch: pytest.MonkeyPatch):
    admission = Admission(lambda: 0.0)
    monkeypatch.setattr(Admission, "_note_end", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), admission.admitted(REQUEST):
        pass
    assert not admission._open and not admission._demand


@pytest.mark.parametrize("num_cached", [0, 1792])
def test_a_prompt_that_was_known_says_nothing_of_how_long_prompts_take(num_cached: int):
    """Those who take as long alone as they do have met with no crowd, whoever was quicker because it was known."""
    clock = FakeClock()
    admission = Admission(clock.time)

    def answer(timeout_s: float, first_s: float, num_found: int = 0) -> None:
        request = replace(asking(timeout_s, max_tokens=32), prompt_token_ids=(0,) * 1800)
        with admission.admitted(request) as one:
            clock.now_s += first_s
            one.found(num_found)
            for _ in range(32):
                one.sent(1)
                clock.now_s += 0.012

    for _ in range(5):
        answer(600, 1.1)
    answer(600, 1.1 - num_cached * 6e-4, num_cached)
    for _ in range(3):
        answer(1.9, 1.1)
    request = replace(asking(2.5, max_tokens=32), prompt_token_ids=(0,) * 1800)
    with admission.admitted(request), admission.admitted(request):
        pass
