"""The README's comparison with other servers shows what docs/figures holds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize(
    ("server", "name", "arm"),
    [
        ("vLLM 0.32, bfloat16", "compare-zen4-modes", "vllm"),
        ("vLLM 0.32, int8", "compare-zen4-modes", "vllm-int8"),
        ("Shoal, full depth \N{SUPERSCRIPT TWO}", "compare-zen4-last-again", "shoal-full"),
        ("Shoal, 10 layers skipped", "compare-zen4-modes", "shoal-shallow"),
        ("Shoal, 10 layers skipped, int8", "compare-zen4-modes", "shoal-shallow-int8"),
    ],
)
def test_each_server_s_row(server: str, name: str, arm: str):
    figures = json.loads((ROOT / "docs" / "figures" / f"{name}.json").read_text(encoding="utf-8"))["median"][arm]
    [cells] = re.findall(rf"^\| {server} \| (.*) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    first, further, *streams = (float(re.sub(r"[^\d.]", "", cell)) for cell in cells.split(" | ")[:4])
    assert (first, further) == (round(figures["TTFT"] * 1e3), round(figures["TPOT"] * 1e3, 1))
    assert streams == [round(figures[f"{count} streams"]) for count in (8, 32)]
