from __future__ import annotations

import pytest

from shoal.engine.pace import Pace


def test_before_a_step_was_seen_it_is_the_most():
    assert Pace(0.5, 2048).num_tokens == 2048


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.25, 2048),  # 4,096 would fit
        (1.0, 1024),
        (1.1, 896),  # 930, whole grains of 64
        (60.0, 128),  # never so few that a step is all overhead
    ],
)
def test_it_is_what_fits_the_target(seconds: float, expected: int):
    pace = Pace(0.5, 2048)
    pace.saw(2048, seconds)
    assert pace.num_tokens == expected


def test_few_tokens_say_nothing():
    pace = Pace(0.5, 2048)
    pace.saw(8, 10.0)
    pace.saw(256, 0.0)
    assert pace.num_tokens == 2048


def test_one_disturbed_step_counts_for_a_third_and_is_forgotten():
    pace = Pace(0.5, 4096)
    pace.saw(1024, 0.5)
    pace.saw(1024, 1.5)
    assert pace.num_tokens == 640  # 1024 / 1.6
    for _ in range(20):
        pace.saw(1024, 0.5)
    assert 960 <= pace.num_tokens <= 1024
    pace.forget()
    assert pace.num_tokens == 4096
