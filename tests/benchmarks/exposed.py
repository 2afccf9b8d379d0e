"""How much of the time to the first token is transfer that no computing hides: as the server itself measures it.

    python tests/benchmarks/exposed.py [--prompt-tokens 1800] [--samples 15] [--json FILE]

A long prompt is handed over again and again, alone, on a server of one replica of each pool. ``transfer_exposed`` is
what lies between asking prefill and the commit, but for prefill's queue and computing: the call itself, copies and
checks. The goal is 3 %.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from pathlib import Path

from child import adopt_orphans
from cost_fits import Sample
from rich.console import Console
from rich.table import Table
from serving_times import ask_alone, server

GOAL = 0.03
_STAGE = "transfer_exposed_s"


def main() -> None:
    options = _options()
    adopt_orphans()
    with server(options.skip_layers) as url:
        samples = asyncio.run(ask_alone(url, options.prompt_tokens, options.samples))
    if not all(one[_STAGE] for one in samples):
        raise SystemExit("error: not every prompt was handed over: ask for longer ones")
    shares = [one[_STAGE] / one["ttft_s"] for one in samples]
    share = statistics.median(shares)
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        found = {"settings": settings, "share": share, "goal": GOAL, "reached": share <= GOAL, "samples": samples}
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    _show(samples)
    Console().print(f"exposed: {share:.1%} of the time to the first token, {min(shares):.1%} to {max(shares):.1%}")


def _show(samples: list[Sample]) -> None:
    table = Table("stage", "median", "of the first token's time")
    ttft_s = statistics.median(one["ttft_s"] for one in samples)
    for stage in (name for name in samples[0] if name.endswith("_s") and name != "tpot_s"):
        seconds = statistics.median(one[stage] for one in samples)
        table.add_row(stage.removesuffix("_s"), f"{1e3 * seconds:.1f} ms", f"{seconds / ttft_s:.1%}")
    Console().print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=1800)
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--skip-layers", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write raw figures here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
