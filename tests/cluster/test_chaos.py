"""``shoal chaos`` shortened, on a cluster of a tiny model and over mutual TLS: what comes back within seconds.

Processes are killed one by one in test_failures.py, and of faults that are alike one is enough in each run of the
tests. With SHOAL_TEST_ALL=1, all scenarios are played here, which takes several minutes more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import save_tiny

import shoal
from shoal_lab.chaos.result import Result
from shoal_lab.chaos.scenario import SCENARIOS, choose

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1200)]

# Processes that are killed take as long as others take to start; of the last ones another has what can be felt, or
# test_failures.py does the same, or without a cluster tests/handoff/test_faults.py and tests/unit/wire/test_probe.py.
LEFT_OUT = {
    "kill-prefill", "kill-prefill-pool", "kill-decode", "kill-gateway", "restart", "disk-full", "roll-plan",
    "kill-prefill-shm", "kill-decode-shm", "bit-flip-shm", "drop-shm",
    "pause-prefill", "half-open", "partition-to-decode", "partition-to-prefill", "delay",
    "slow-reader", "truncate", "duplicate", "reset", "drop", "reorder", "clock-jump",
}  # fmt: skip
QUICK = ",".join(scenario.name for scenario in SCENARIOS if scenario.name not in LEFT_OUT)
NAMES = [scenario.name for scenario in choose("all" if os.environ.get("SHOAL_TEST_ALL") == "1" else QUICK)]
# Of these one sees more than that things take their time.
FELT = {
    "kill-prefill-pool", "kill-decode", "restart", "partition", "partition-to-decode", "partition-to-prefill", "reset",
    "half-open", "truncate", "bit-flip", "drop", "disk-full", "kill-decode-shm", "bit-flip-shm",
    "drop-shm",
}  # fmt: skip
NUM_REQUESTS, NUM_IN_FLIGHT = 40, 32

# In a process of its own, as the command is: it sets the environment of all that it starts.
_RUN = f"""
import sys
from pathlib import Path
from shoal_lab.chaos.play import Limits
from shoal_lab.chaos.run import ChaosOptions, run
from shoal_lab.chaos.scenario import choose
folder, figures = sys.argv[1:]
limits = Limits({NUM_REQUESTS}, {NUM_IN_FLIGHT}, deadline_s=60, recover_within_s=120)
options = ChaosOptions(folder, choose("{",".join(NAMES)}"), limits, num_cases=16, num_burst=24, ttl_s=1, tls=True)
report = run(options, lambda *step: print(*step), lambda result: print(result))
Path(figures).write_text(report.to_json())
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    folder: Path = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, dtype=torch.float32)
    figures = folder.with_suffix(".json")
    # In their order one after the other; what one leaves behind would be seen by the next.
    ran = subprocess.run(
        [sys.executable, "-c", _RUN, str(folder), str(figures)],
        env=os.environ | {"PYTHONPATH": str(Path(shoal.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=1140,
        check=False,
    )
    assert ran.returncode == 0, f"{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"
    return {tree["scenario"]: Result(**tree) for tree in json.loads(figures.read_text())["results"]}


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
