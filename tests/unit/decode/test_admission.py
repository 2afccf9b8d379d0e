"""Who is let in, over a pool of which everything is known."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
from admission_pool import Pool, Source, asking, measured, run
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
@pytest.mark.parametrize("times", [2.0, 10.0])
def test_however_much_is_asked_as_much_is_done_as_can_be(name: str, times: float):
    pool = pool_like(name)
    tally = measured(pool, SECONDS, load(pool, times))["one"]
    possible = capacity_of(pool) * SECONDS
    assert tally.done > 0.9 * possible and tally.late < 0.05 * possible


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
def test_after_an_overload_all_are_let_in_again(name: str):
    pool = pool_like(name)
    run(pool, 60.0, load(pool, 3.0))
    run(pool, 15.0, load(pool, 0.5))
    pool.tallies = {}
    run(pool, 60.0, load(pool, 0.5))
    assert not pool.of().refusals and not pool.of().late


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


def test_one_that_is_refused_is_told_when_to_come_again():
    pool = pool_like("batch")
    run(pool, 60.0, load(pool, 3.0))
    refusals = pool.of().refusals
    assert len(refusals) > 100
    assert all(one.retry_after_s is not None and 0 < one.retry_after_s < TIMEOUT_S for one in refusals)
    assert "too much is asked" in str(refusals[-1])


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
