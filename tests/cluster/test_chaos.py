"""``shoal chaos`` shortened: one cluster of a tiny model, and of each kind of fault one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shoal
from models import save_tiny
from shoal.chaos.result import Result

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]

NAMES = "partition,bit-flip,full-pool"
NUM_REQUESTS, NUM_IN_FLIGHT = 40, 32

# In a process of its own, as the command is: it sets the environment of all that it starts.
_RUN = f"""
import sys
from pathlib import Path
from shoal.chaos.play import Limits
from shoal.chaos.run import ChaosOptions, run
from shoal.chaos.scenario import choose
folder, figures = sys.argv[1:]
limits = Limits({NUM_REQUESTS}, {NUM_IN_FLIGHT}, deadline_s=60, recover_within_s=60)
options = ChaosOptions(folder, choose("{NAMES}"), limits, num_cases=16, num_burst=16, ttl_s=1)
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
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, f"{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"
    return {tree["scenario"]: Result(**tree) for tree in json.loads(figures.read_text())["results"]}


@pytest.mark.parametrize("name", NAMES.split(","))
def test_a_fault_costs_no_wrong_token_no_hung_request_and_no_memory(results: dict[str, Result], name: str):
    result = results[name]
    assert result.is_clean, result
    assert result.num_in_flight >= NUM_IN_FLIGHT
    assert sum(result.num_by_end.values()) >= NUM_REQUESTS
    if name != "full-pool":
        assert result.num_by_end["correct"] >= 0.99 * sum(result.num_by_end.values()), result


@pytest.mark.parametrize("name", ["partition", "bit-flip"])
def test_the_fault_was_felt(results: dict[str, Result], name: str):
    assert results[name].repairs, results[name]


def test_a_full_pool_says_so(results: dict[str, Result]):
    assert results["full-pool"].num_by_code.get("overloaded", 0) > 0
