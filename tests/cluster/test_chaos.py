"""``shoal chaos`` shortened: one cluster of a tiny model, and of each kind of fault one.

In disk-full, a replica of each pool is killed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models import save_tiny
from shoal.chaos.load import End
from shoal.chaos.play import Limits
from shoal.chaos.result import Result
from shoal.chaos.run import ChaosOptions, run
from shoal.chaos.scenario import choose

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]

NAMES = "partition,half-open,bit-flip,full-pool,disk-full"
LIMITS = Limits(num_requests=40, num_in_flight=32, deadline_s=60, recover_within_s=60)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    folder: Path = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, dtype=torch.float32)
    # In their order one after the other; what one leaves behind would be seen by the next.
    options = ChaosOptions(str(folder), choose(NAMES), LIMITS, num_cases=16, num_burst=16, ttl_s=1)
    report = run(options, lambda *_step: None, lambda _result: None)
    return {result.scenario: result for result in report.results}


@pytest.mark.parametrize("name", NAMES.split(","))
def test_a_fault_costs_no_wrong_token_no_hung_request_and_no_memory(results: dict[str, Result], name: str):
    result = results[name]
    assert result.is_clean, result
    assert result.num_in_flight >= LIMITS.num_in_flight
    assert result.num_requests >= LIMITS.num_requests
    if name != "full-pool":
        assert result.num(End.CORRECT) >= 0.99 * result.num_requests, result


@pytest.mark.parametrize("name", ["partition", "half-open", "bit-flip", "disk-full"])
def test_the_fault_was_felt(results: dict[str, Result], name: str):
    assert results[name].repairs, results[name]


def test_a_full_pool_says_so(results: dict[str, Result]):
    assert results["full-pool"].num_by_code.get("overloaded", 0) > 0
