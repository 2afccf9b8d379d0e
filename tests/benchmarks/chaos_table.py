"""The figures of ``shoal chaos --json`` as a table for docs/reliability.md.

python tests/benchmarks/chaos_table.py docs/figures/chaos.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shoal_lab.chaos.load import End
from shoal_lab.chaos.result import Result
from shoal_lab.chaos.table import row

COLUMNS = (
    "scenario", "what happens", "requests", "correct", "clear errors", "cut off", "wrong", "hung", "felt",
    "recovered after", "left",
)  # fmt: skip


def lines(tree: dict[str, Any]) -> Iterator[str]:
    """A line for each scenario, between the head and the sums."""
    yield _line(*COLUMNS)
    yield _line("---", "---", *["---:"] * (len(COLUMNS) - 2))
    results = [Result(**one) for one in tree["results"]]
    for result in results:
        name, *cells = row(result)
        yield _line(f"`{name}`", result.says, *cells)
    num_felt = sum(result.num_felt for result in results)
    sums = (tree["num_requests"], *(tree["num_by_end"][end] for end in End), num_felt)
    yield _line("all", "", *map(str, sums), "", "")


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join(lines(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
