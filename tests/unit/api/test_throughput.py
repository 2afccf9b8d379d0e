"""How long one after the other takes."""

from __future__ import annotations

import pytest

from shoal.api.throughput import Throughput


class Clock:
    now_s = 5.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def go_on(throughput: Throughput, clock: Clock, num: int, *, every_s: float) -> None:
    for _ in range(num):
        clock.now_s += every_s
        throughput.done()


def test_the_next_takes_as_long_as_those_before(clock: Clock):
    throughput = Throughput(clock)
    throughput.measure(True)
    go_on(throughput, clock, 300, every_s=0.5)
    assert throughput.seconds_each == pytest.approx(0.5, rel=0.02)


def test_of_little_nothing_is_said(clock: Clock):
    throughput = Throughput(clock)
    throughput.measure(True)
    go_on(throughput, clock, 7, every_s=0.5)
    assert throughput.seconds_each is None
    go_on(throughput, clock, 1, every_s=0.5)
    assert throughput.seconds_each == pytest.approx(0.5, rel=0.1)


def test_where_nothing_comes_of_anything_it_takes_an_hour(clock: Clock):
    throughput = Throughput(clock)
    throughput.measure(True)
    go_on(throughput, clock, 8, every_s=0.5)
    clock.now_s += 3600
    assert throughput.seconds_each == 3600


def test_only_time_that_is_measured_counts(clock: Clock):
    throughput = Throughput(clock)
    for _ in range(100):
        throughput.measure(True)
        go_on(throughput, clock, 1, every_s=0.5)
        throughput.measure(False)
        go_on(throughput, clock, 1, every_s=100)
    assert throughput.seconds_each == pytest.approx(0.5, rel=0.02)


def test_what_was_long_ago_counts_for_little(clock: Clock):
    throughput = Throughput(clock)
    throughput.measure(True)
    go_on(throughput, clock, 100, every_s=0.5)
    go_on(throughput, clock, 40, every_s=5)
    assert throughput.seconds_each == pytest.approx(5, rel=0.1)
