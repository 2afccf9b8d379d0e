"""A sweep finds the rate at which an endpoint saturates."""

from __future__ import annotations

import pytest

from shoal_lab.bench.sweep import MAX_DOUBLINGS, MAX_HALVINGS, next_rate


def swept(capacity: float, start: float = 1.0) -> dict[float, bool]:
    held: dict[float, bool] = {}
    while (rate := next_rate(start, held)) is not None:
        assert rate not in held
        held[rate] = rate <= capacity
    return held


def test_rates_double_to_the_first_that_fails_and_are_halved_in_between():
    assert list(swept(5.3).items()) == [
        (1, True), (2, True), (4, True), (8, False), (6, False), (5, True), (5.5, False),
    ]  # fmt: skip


def test_where_the_first_rate_fails_lower_ones_are_tried():
    assert list(swept(0.3).items()) == [
        (1, False), (0.5, False), (0.25, True), (0.375, False), (0.3125, False), (0.28125, True)
    ]  # fmt: skip


@pytest.mark.parametrize("capacity", [0.11, 0.7, 1, 3.99, 57, 900])
def test_the_goodput_is_known_to_an_eighth(capacity: float):
    good = max(rate for rate, holds in swept(capacity).items() if holds)
    assert good <= capacity <= good * 1.125


def test_an_endpoint_that_bears_everything_or_nothing_ends_the_search():
    assert max(swept(float("inf"))) == 2**MAX_DOUBLINGS
    assert min(swept(0.0, start=4.0)) == 4 / 2**MAX_HALVINGS
