"""Draw what compare.py measured: how many times as fast as the baseline each arm is.

python tests/benchmarks/comparison_plot.py compare.json compare.svg --arms transformers vllm shoal-shallow
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal_lab.report.plots import MAX_BARS, Bars, bar_plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, help="what compare.py --json wrote")
    parser.add_argument("svg", type=Path, help="where the plot goes")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these, in their order, four at most")
    options = parser.parse_args()
    figures = json.loads(options.figures.read_text(encoding="utf-8"))
    if unknown := set(options.arms or ()) - set(figures["arms"]):
        parser.error(f"no arm called {', '.join(sorted(unknown))} was measured: there are {', '.join(figures['arms'])}")
    arms = options.arms or list(figures["arms"])[:MAX_BARS]
    if len(arms) > MAX_BARS:
        parser.error(f"{len(arms)} arms, of which {MAX_BARS} at most can be told apart")
    options.svg.write_text(plot(figures, arms) + "\n", encoding="utf-8")


def plot(figures: dict[str, Any], arms: Sequence[str]) -> str:
    """An SVG element, of what compare.py --json wrote."""
    speed, load = figures["speed_over_baseline"], figures["settings"]["load"]
    metrics = list(speed[figures["baseline"]])
    names = {"TTFT": f"first token of\n{load['prompt_tokens']:,} tokens", "TPOT": "a further token"}
    return bar_plot(
        [names.get(metric, f"{metric},\ntokens/s") for metric in metrics],
        [Bars(arm, [speed[arm][metric] for metric in metrics]) for arm in arms],
        y_label=f"times as fast as {figures['baseline']}",
    )


if __name__ == "__main__":
    main()
