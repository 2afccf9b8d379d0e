"""The table of docs/reliability.md shows what docs/figures/overload.json holds."""

from __future__ import annotations

import json
import re
from pathlib import Path

DOCS = Path(__file__).parents[4] / "docs"


def test_the_table_is_of_the_figures():
    text = (DOCS / "reliability.md").read_text(encoding="utf-8")
    found = json.loads((DOCS / "figures" / "overload.json").read_text(encoding="utf-8"))
    of_load: dict[float, dict[bool, dict[str, float]]] = {}
    for one in found["found"]:
        of_load.setdefault(one["load"], {})[one["tells_timeout"]] = one
    expected = [
        [load, round(both[True]["rate"], 2)]
        + [round(both[told][name], 2) for told in (True, False) for name in ("in_time", "refused", "late")]
        for load, both in sorted(of_load.items())
    ]
    rows = re.findall(r"^\| [\d.]+ x \|.*$", text, re.MULTILINE)
    assert [[float(cell) for cell in re.findall(r"[\d.]+", row)] for row in rows] == expected
    assert f"got {found['capacity']:.2f} answers a second" in text
    assert f"wait {found['settings']['timeout_s']:g} s" in text
