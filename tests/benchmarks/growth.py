"""What growth costs: tokens a second by the number of streams, and of many replicas on the cores of one.

    python tests/benchmarks/growth.py [--streams 1 2 4 8 16 32] [--replicas 4] [--rounds 3] [--json FILE]

Two servers take turns on this machine's cores: one of a prefill and a decode replica, one of so many of each. Both are
asked by so many streams at once over HTTP, prompts handed over, answers of a fixed length. Goals: from one number of
streams to the next, tokens a second never fall; with the most streams, many replicas give 85 % of what one gives.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

from child import adopt_orphans
from load import LoadOptions, Loads, send_at_once, span_s
from rich.console import Console
from rich.progress import track
from rich.table import Table
from serving_times import server

SHARE_GOAL = 0.85
Rates = dict[tuple[int, int], list[float]]


def main() -> None:
    options = _options()
    adopt_orphans()
    rates: Rates = defaultdict(list)
    sizes = (1, options.replicas)
    order = [(number, size) for number in range(options.rounds) for size in (sizes if number % 2 == 0 else sizes[::-1])]
    for number, replicas in track(order, description="rounds", console=Console(stderr=True)):
        with server(options.skip_layers, replicas) as url:
            for streams, rate in asyncio.run(_ask_all(url, options, number)).items():
                rates[replicas, streams].append(rate)
    result = summary(rates, options.streams, options.replicas)
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        options.json.write_text(json.dumps({"settings": settings, **result}, indent=2) + "\n", encoding="utf-8")
    _show(result)


def summary(rates: Rates, streams: list[int], replicas: int) -> dict[str, object]:
    """Medians of rounds. ``never_falls`` is of one replica; ``share`` what many give of that, by streams."""
    of_one, of_many = ({num: statistics.median(rates[size, num]) for num in streams} for size in (1, replicas))
    share = {num: of_many[num] / of_one[num] for num in streams}
    return {
        "tokens_per_s": [
            {"replicas": size, "streams": num, "rounds": found} for (size, num), found in sorted(rates.items())
        ],
        "medians": {"1": of_one, str(replicas): of_many},
        "never_falls": all(of_one[more] >= of_one[fewer] for fewer, more in pairwise(sorted(streams))),
        "share": share,
        "share_goal_reached": share[max(streams)] >= SHARE_GOAL,
    }


async def _ask_all(url: str, options: argparse.Namespace, number: int) -> dict[int, float]:
    load = LoadOptions(stream_prompt_tokens=options.prompt_tokens, stream_output_tokens=options.output_tokens)
    loads = Loads(range(1000, 9000), load, seed=number)
    await send_at_once(url, loads.together("warm-up", max(options.streams), 8))
    rates = {}
    for streams in options.streams:
        tokens, seconds = 0, 0.0
        for sample in range(-(-options.least_streams // streams)):
            records = await send_at_once(url, loads.together(f"round {number}, {sample}", streams))
            seconds += span_s(records)
            tokens += sum(record.output_tokens for record in records)
        rates[streams] = tokens / seconds
    return rates


def _show(result: dict[str, object]) -> None:
    medians, share = result["medians"], result["share"]
    assert isinstance(medians, dict) and isinstance(share, dict)
    (_, of_one), (replicas, of_many) = medians.items()
    table = Table("streams", "1 replica, tokens/s", f"{replicas} replicas", "share")
    for streams, rate in of_one.items():
        table.add_row(str(streams), f"{rate:.0f}", f"{of_many[streams]:.0f}", f"{share[streams]:.0%}")
    console = Console()
    console.print(table)
    console.print(f"tokens/s {'never fall' if result['never_falls'] else 'FALL'} with more streams")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--skip-layers", type=int, default=10)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--least-streams", type=int, default=4, help="fewer streams are asked several times in a row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write raw figures here")
    options = parser.parse_args()
    if options.replicas < 2:
        parser.error("--replicas: 2 at least, to be compared with one")
    return options


if __name__ == "__main__":
    main()
