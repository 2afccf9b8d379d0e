"""The tables of docs/performance.md show what docs/figures holds, and docs/figures holds nothing that no page cites."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

import pytest

DOCS = Path(__file__).parents[4] / "docs"
PAGE = (DOCS / "performance.md").read_text(encoding="utf-8")
MACHINES = ("Zen 4", "Zen 5", "Xeon with AMX", "Ice Lake")
SERVERS = {
    "vLLM 0.32, bfloat16": ("compare-zen4-modes", "vllm"),
    "vLLM 0.32, int8": ("compare-zen4-modes", "vllm-int8"),
    "vLLM's own prefill/decode split": ("compare-zen4-modes", "vllm-pair"),
    "transformers 5.24, bfloat16": ("compare-zen4-modes", "transformers"),
    "llama.cpp, Q4_1, AVX2": ("compare-zen4-modes", "llama.cpp"),
    "Shoal, full depth \N{SUPERSCRIPT TWO}": ("compare-zen4-last-again", "shoal-full"),
    "Shoal, 10 layers skipped": ("compare-zen4-modes", "shoal-shallow"),
    "Shoal, 10 layers skipped, int8": ("compare-zen4-modes", "shoal-shallow-int8"),
}


def figures(name: str) -> Any:
    return json.loads((DOCS / "figures" / f"{name}.json").read_text(encoding="utf-8"))


def row(label: str) -> list[str]:
    """The cells of the one row that begins with ``label``, which may be a link."""
    [cells] = re.findall(rf"^\| (?:\[{re.escape(label)}\]\([^)]+\)|{re.escape(label)}) \| (.*) \|$", PAGE, re.MULTILINE)
    return [cell.strip() for cell in cells.split("|")]


def cell(goal: dict[str, Any], runs: dict[str, float]) -> str:
    target, values = goal["target"], sorted(runs.values())
    digits = 2 if goal["unit"] == "times" else 0 if abs(target) > 5 else 1
    middle, least, most = (f"{value:.{digits}f}" for value in (median(values), values[0], values[-1]))
    is_missed = median(values) > -target if target < 0 else median(values) < target
    shown = f"**{middle}**" if is_missed else middle
    return shown if len(values) == 1 else f"{shown} ({least}\N{EN DASH}{most})"


@pytest.mark.parametrize("goal", figures("goals")["goals"], ids=lambda goal: goal["goal"])
def test_a_goal_s_row_is_of_its_runs(goal: dict[str, Any]):
    target = goal["target"]
    told, *cells = row(goal["goal"])
    unit = "%" if goal["unit"] == "%" else ""
    assert told == (f"≤{-target}{unit}" if target < 0 else f"{target}{unit}")
    expected = [cell(goal, goal["runs"][machine]) if machine in goal["runs"] else "" for machine in MACHINES]
    assert cells + [""] * (len(MACHINES) - len(cells)) == expected


@pytest.mark.parametrize("server", SERVERS)
def test_a_server_s_row_is_of_its_run(server: str):
    name, arm = SERVERS[server]
    found = figures(name)["median"][arm]
    first, further, *streams = (float(re.sub(r"[^\d.]", "", told)) for told in row(server)[:4])
    assert (first, further) == (round(found["TTFT"] * 1e3), round(found["TPOT"] * 1e3, 1))
    assert streams == [round(found[f"{count} streams"]) for count in (8, 32)]


def test_every_raw_file_is_cited():
    pages = "".join(path.read_text(encoding="utf-8") for path in DOCS.glob("*.md"))
    assert [path.name for path in (DOCS / "figures").iterdir() if f"(figures/{path.name})" not in pages] == []
