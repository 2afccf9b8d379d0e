"""The token bucket."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.config import RateConfig
from shoal.config.rate import RateLimit


class Clock:
    now_s = 5.0

    def __call__(self) -> float:
        return self.now_s


def test_a_burst_at_once_then_so_many_a_second():
    clock = Clock()
    limit = RateLimit(RateConfig(per_s=2, burst=3), clock)
    assert [limit.take() for _ in range(5)] == [True, True, True, False, False]
    assert limit.wait_s == 0.5
    clock.now_s += 0.5
    assert limit.wait_s == 0
    assert [limit.take() for _ in range(2)] == [True, False]


def test_who_books_waits_for_a_turn_of_its_own():
    clock = Clock()
    limit = RateLimit(RateConfig(per_s=2, burst=2), clock)
    assert [limit.book(within_s=60) for _ in range(4)] == [0, 0, 0.5, 1.0]
    assert limit.wait_s == 1.5 and not limit.take()
    clock.now_s += 1.5
    assert limit.take() and not limit.take()


def test_a_turn_that_would_come_too_late_is_not_booked():
    limit = RateLimit(RateConfig(per_s=2, burst=1), Clock())
    assert [limit.book(within_s=0.5) for _ in range(4)] == [0, 0.5, None, None]
    assert limit.book(within_s=1) == 1


@given(st.lists(st.floats(0, 3), max_size=60), st.floats(0.1, 20), st.integers(1, 8))
def test_never_more_than_a_burst_and_the_rate_allow(pauses: list[float], per_s: float, burst: int):
    clock = Clock()
    limit = RateLimit(RateConfig(per_s=per_s, burst=burst), clock)
    num_taken = 0
    for pause in pauses:
        clock.now_s += pause
        num_taken += limit.take()
    assert num_taken <= burst + per_s * sum(pauses) + 1e-6
