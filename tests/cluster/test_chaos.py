"""``shoal chaos`` shortened: every scenario, over mutual TLS, on one cluster of a tiny model for each carrier."""

from __future__ import annotations

import pytest

from chaos_run import NUM_IN_FLIGHT, NUM_REQUESTS
from shoal.chaos.result import Result
from shoal.chaos.scenario import SCENARIOS

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1260)]

NAMES = [scenario.name for scenario in SCENARIOS]
# What one sees of a fault that was repaired; the others take time alone, or end requests with their connection.
FELT = {
    "kill-prefill-pool", "kill-decode", "restart", "partition", "partition-to-decode", "partition-to-prefill", "reset",
    "half-open", "truncate", "bit-flip", "drop", "disk-full", "kill-decode-shm", "bit-flip-shm",
}  # fmt: skip


@pytest.fixture(scope="module")
def results(chaos: list[dict[str, object]]) -> dict[str, Result]:
    return {str(tree["scenario"]): Result(**tree) for tree in chaos}  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_a_fault_costs_no_wrong_token_no_hung_request_and_no_memory(results: dict[str, Result], name: str):
    result = results[name]
    assert result.is_clean, result
    assert result.num_in_flight >= NUM_IN_FLIGHT
    assert result.num_requests >= NUM_REQUESTS
    # A gateway that ends takes its connections with it; a full pool says so.
    num_others = result.num_requests - result.num_by_end.get("cut_off", 0)
    if name != "full-pool":
        assert result.num_by_end["correct"] >= 0.99 * num_others, result


@pytest.mark.parametrize("name", [name for name in NAMES if name in FELT])
def test_the_fault_was_felt(results: dict[str, Result], name: str):
    assert results[name].repairs, results[name]


def test_a_full_pool_says_so(results: dict[str, Result]):
    assert results["full-pool"].num_by_code.get("overloaded", 0) > 0
