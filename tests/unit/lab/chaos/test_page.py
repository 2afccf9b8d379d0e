"""docs/reliability.md tells what docs/figures/chaos.json has."""

from __future__ import annotations

import json
from pathlib import Path

from chaos_table import lines

from shoal_lab.chaos.scenario import SCENARIOS

DOCS = Path(__file__).parents[4] / "docs"
TREE = json.loads((DOCS / "figures" / "chaos.json").read_text())


def test_the_page_has_the_table_of_a_whole_run():
    page = (DOCS / "reliability.md").read_text()
    assert [line for line in lines(TREE) if line not in page] == []
    assert {result["scenario"] for result in TREE["results"]} == {scenario.name for scenario in SCENARIOS}


def test_the_run_was_large_enough_and_clean():
    assert TREE["is_clean"] and TREE["num_requests"] >= 1000 and TREE["correct_ratio"] >= 0.99
    assert all(result["num_in_flight"] >= 32 for result in TREE["results"])
