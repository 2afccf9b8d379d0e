"""Whatever comes: each request ends once, nothing stays behind, and limits hold at every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from simulation.costs import PrefillCost
from simulation.routing import Routing, choose
from simulation.system import Fleet, System
from simulations import COSTS, costs, free, request, run

from shoal.config import HandoffConfig, RateConfig, ShoalConfig, StageConfig
from shoal.engine.scheduler import Scheduler, StepPlan
from shoal_lab.bench.record import Failure
from shoal_lab.bench.workload import PlannedRequest

TIGHT = ShoalConfig(
    prefill=StageConfig(num_blocks=40, max_sequences=1, max_queued=4, max_step_tokens=96),
    decode=StageConfig(num_blocks=60, max_sequences=6, max_queued=8),
    handoff=HandoffConfig(min_tokens=2, claim_timeout_s=0.02, other_replica=RateConfig(per_s=1, burst=5)),
)


def crowd(num: int = 120, rate: float = 60.0, seed: int = 3) -> list[PlannedRequest]:
    rng = np.random.default_rng(seed)
    moments = rng.exponential(1 / rate, num).cumsum()
    return [
        request(index, float(moment), int(rng.integers(1, 400)), int(rng.integers(1, 60)))
        for index, moment in enumerate(moments)
    ]


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Scheduler]]:
    """All schedulers, looked at before each of their steps."""
    seen: list[Scheduler] = []
    schedule = Scheduler.schedule

    def look(self: Scheduler) -> StepPlan:
        seen.append(self)
        held = [block for sequence in self.sequences for block in sequence.blocks]
        assert len(held) == len(set(held)) == self.allocator.num_blocks - self.allocator.num_free
        plan = schedule(self)
        assert sum(row.num_rows for row in plan.rows) <= self.max_step_tokens
        assert len(self.running) + len(self.reserved) <= self._max_sequences
        return plan

    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "schedule", look)
        yield seen


@pytest.mark.parametrize("fleet", [Fleet(1, 1, 10), Fleet(2, 3, 0), Fleet(0, 2, 10), Fleet(2, 2, 10, is_shared=True)])
def test_every_request_ends_once_and_limits_hold_where_all_is_tight(fleet: Fleet, monkeypatch: pytest.MonkeyPatch):
    requests = crowd()
    with watched(monkeypatch) as seen:
        system = run(requests, fleet, COSTS, TIGHT)
    assert Counter(record.index for record in system.records) == Counter(one.index for one in requests)
    for record in system.records:
        whole = record.failure is None
        assert record.output_tokens == (record.max_tokens if whole else 0)
        assert whole or record.failure is Failure.REJECTED
        assert not whole or 0 < (record.ttft_s or 0) <= (record.e2e_s or 0)
    assert len({id(scheduler) for scheduler in seen}) == fleet.num_prefill + fleet.num_decode
    assert all(replica.num_ongoing == 0 for replica in (*system.prefill, *system.decode))
    # The limits were met, or nothing of this would have been tried.
    assert any(record.failure is not None for record in system.records)
    assert system.usage.num_preemptions > 0
    assert system.usage.num_fallbacks > 0 or not fleet.num_prefill


def test_with_room_for_all_nothing_is_refused_and_every_prompt_is_shipped_once():
    requests = crowd(rate=20.0)
    system = run(requests, Fleet(2, 2, 10))
    assert all(record.failure is None for record in system.records)
    assert system.usage.num_fallbacks == system.usage.num_preemptions == 0
    handed_off = sum(one.prompt_tokens - 1 for one in requests if one.prompt_tokens > 1)
    assert system.usage.wire_bytes == handed_off * COSTS.handoff.token_bytes
    assert sum(one.engine.num_tokens for one in system.prefill) == handed_off
    # Decode runs a boundary token, and every generated one but the last.
    outputs = sum(one.max_tokens for one in requests)
    alone = sum(1 for one in requests if one.prompt_tokens == 1)
    assert sum(one.engine.num_tokens for one in system.decode) == outputs
    assert alone < len(requests)


@pytest.mark.parametrize("is_shared", [False, True])
def test_the_same_seed_gives_the_same_records_and_another_one_others(is_shared: bool):
    def records(seed: int) -> list[object]:
        system = System(Fleet(3, 3, 10, is_shared), COSTS, TIGHT, seed)
        system.offer(crowd(60))
        system.run()
        return list(system.records)

    assert records(1) == records(1)
    assert records(1) != records(2)


def test_where_prefill_has_no_room_in_time_decode_computes_the_prompt_itself():
    slow = (PrefillCost(skip_layers=0, step_s=0.0, token_s=0.1, token_context_s=0.0),)
    config = ShoalConfig(
        prefill=StageConfig(max_sequences=1),
        decode=StageConfig(),
        handoff=HandoffConfig(min_tokens=2, claim_timeout_s=1.0),
    )
    system = run([request(0, 0.0), request(1, 0.0)], Fleet(1, 1, 0), free(prefill=slow), config)
    first, second = (record.ttft_s for record in system.records)
    # The second waits for a second, then decode runs its 101 tokens; the first one's K/V come while that step lasts.
    assert (first, second) == pytest.approx((1.0 + 10.1, 1.0 + 10.1))
    assert system.usage.wire_bytes == 100
    assert system.usage.num_fallbacks == 1


def test_below_the_last_rung_a_request_is_refused():
    config = ShoalConfig(
        prefill=StageConfig(max_sequences=1), decode=StageConfig(),
        handoff=HandoffConfig(min_tokens=2, claim_timeout_s=1.0, max_attempts=1),
    )  # fmt: skip
    slow = (PrefillCost(skip_layers=0, step_s=0.0, token_s=0.1, token_context_s=0.0),)
    system = run([request(0, 0.0), request(1, 0.0)], Fleet(1, 1, 0), free(prefill=slow), config)
    assert sorted(record.detail for record in system.records) == ["", "unavailable"]


def test_a_queue_that_is_full_by_its_tokens_refuses_more():
    """One runs, and one of 101 tokens waits, where 150 may."""
    config = ShoalConfig(decode=StageConfig(max_sequences=1, max_queued_tokens=150))
    requests = [request(index, 0.1 * index, num_output=100) for index in range(3)]
    system = run(requests, Fleet(0, 1, 0), COSTS, config)
    assert [record.detail for record in system.records] == ["", "", "overloaded"]


class Replica:
    def __init__(self, index: int, num_ongoing: int) -> None:
        self.index, self.num_ongoing = index, num_ongoing


def test_of_two_random_replicas_the_idler_is_chosen_and_of_all_the_idlest():
    replicas = [Replica(index, num_ongoing) for index, num_ongoing in enumerate((5, 4, 3, 2))]
    rng = np.random.default_rng(0)
    counts = Counter(choose(replicas, Routing.TWO_CHOICES, rng).index for _ in range(6000))
    # Of six pairs, the idlest is in three, the next in two more, the third in one, the fullest never wins.
    assert counts[0] == 0
    assert [counts[index] / 6000 for index in (3, 2, 1)] == pytest.approx([3 / 6, 2 / 6, 1 / 6], abs=0.03)
    assert {choose(replicas, Routing.SHORTEST, rng).index for _ in range(20)} == {3}
    assert {choose(replicas, Routing.SHORTEST, rng, excluded={3}).index for _ in range(20)} == {2}
    assert choose(replicas[:1], Routing.TWO_CHOICES, rng, excluded={0}).index == 0


def test_packed_the_busiest_that_has_room_is_chosen_and_without_room_the_least_busy_of_all():
    replicas = [Replica(index, num_ongoing) for index, num_ongoing in enumerate((5, 4, 4, 2))]
    rng = np.random.default_rng(0)
    assert {choose(replicas, Routing.TWO_CHOICES, rng, pack_up_to=5).index for _ in range(20)} == {1}
    assert {choose(replicas, Routing.TWO_CHOICES, rng, {1, 2}, pack_up_to=5).index for _ in range(20)} == {3}
    assert {choose(replicas, Routing.TWO_CHOICES, rng, pack_up_to=2).index for _ in range(20)} == {3}


@pytest.mark.parametrize(
    ("is_shared", "pack_up_to", "routing", "used"),
    [
        (True, None, Routing.TWO_CHOICES, 1),
        (True, None, Routing.SHORTEST, 2),
        (True, 0, Routing.TWO_CHOICES, 2),
        (False, 9, Routing.TWO_CHOICES, 1),
    ],
)
def test_replicas_of_the_same_cores_are_filled_one_after_the_other(
    is_shared: bool, pack_up_to: int | None, routing: Routing, used: int
):
    """One begins a step for all of eight answers, where two begin as many again."""
    config = ShoalConfig(decode={"pack_up_to": pack_up_to})
    requests = [request(index, 0.0, num_prompt=1, num_output=20) for index in range(8)]
    system = run(requests, Fleet(1, 2, 10, is_shared, routing), COSTS, config)
    assert sum(one.engine.num_tokens > 0 for one in system.decode) == used


def test_a_link_is_waited_for_and_two_ways_in_are_two():
    """Both prefill replicas send at once: into one decode replica one after the other, into two side by side."""
    known = free(
        prefill=(PrefillCost(skip_layers=0, step_s=1.0, token_s=0.0, token_context_s=0.0),),
        handoff=costs().handoff.model_copy(update={"bytes_per_s": 100.0, "token_bytes": 1, "latency_s": 0.0}),
    )
    fleets = (Fleet(2, num, 0, routing=Routing.SHORTEST) for num in (1, 2))
    one, two = (run([request(0, 0.0), request(1, 0.0)], fleet, known).records for fleet in fleets)
    assert sorted(record.ttft_s or 0 for record in one) == pytest.approx([2.0, 3.0])
    assert sorted(record.ttft_s or 0 for record in two) == pytest.approx([2.0, 2.0])
