"""Which rung follows a failed hand-off."""

from __future__ import annotations

import pytest

from shoal.config import HandoffConfig
from shoal.decode.ladder import Ladder
from shoal.telemetry.labels import FallbackRung

OTHER, LOCAL, UNAVAILABLE = FallbackRung.OTHER_REPLICA, FallbackRung.LOCAL, FallbackRung.UNAVAILABLE
SELDOM = {"per_s": 0.5, "burst": 1}


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize(
    ("max_attempts", "rungs"),
    [(1, [UNAVAILABLE]), (2, [LOCAL, UNAVAILABLE]), (3, [OTHER, LOCAL, UNAVAILABLE]), (4, [OTHER, OTHER, LOCAL])],
)
def test_other_replicas_come_first_and_decode_itself_last(max_attempts: int, rungs: list[FallbackRung]):
    ladder = Ladder(HandoffConfig(max_attempts=max_attempts))
    assert [ladder.after(attempt, has_other_replica=True) for attempt in range(1, len(rungs) + 1)] == rungs


def test_without_another_replica_its_rung_is_passed_over():
    ladder = Ladder(HandoffConfig())
    assert ladder.after(1, has_other_replica=False) is LOCAL
    assert ladder.after(2, has_other_replica=False) is LOCAL
    assert ladder.after(3, has_other_replica=False) is UNAVAILABLE


def test_a_rung_that_was_taken_too_often_is_passed_over_until_its_time_has_come():
    clock = Clock()
    ladder = Ladder(HandoffConfig(other_replica=SELDOM, local=SELDOM), clock)
    assert [ladder.after(1, has_other_replica=True) for _ in range(3)] == [OTHER, LOCAL, UNAVAILABLE]
    assert ladder.retry_after_s == 2
    clock.now_s = 2
    assert [ladder.after(1, has_other_replica=True) for _ in range(3)] == [OTHER, LOCAL, UNAVAILABLE]


def test_a_rung_that_is_passed_over_is_not_used_up():
    ladder = Ladder(HandoffConfig(other_replica=SELDOM, local=SELDOM), Clock())
    assert ladder.after(3, has_other_replica=True) is UNAVAILABLE
    assert ladder.after(1, has_other_replica=True) is OTHER
    assert ladder.after(1, has_other_replica=False) is LOCAL


def test_the_last_attempt_of_several_is_decodes_own_at_once():
    ladder = Ladder(HandoffConfig(max_attempts=3))
    assert [ladder.is_at_its_end(attempt) for attempt in (1, 2, 3)] == [False, False, True]
    # With a single attempt in all, prompts are handed over as ever.
    assert not Ladder(HandoffConfig(max_attempts=1)).is_at_its_end(1)
    seldom = Ladder(HandoffConfig(local=SELDOM), Clock())
    assert [seldom.is_at_its_end(3) for _ in range(2)] == [True, False]
