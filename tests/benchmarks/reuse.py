"""How much sooner a first token comes where pools remember what other prompts left behind.

    python tests/benchmarks/reuse.py [--prompt-tokens 1800] [--rounds 5] [--pause-s 1] [--json FILE]

A server of one replica of each pool (``shoal serve --reuse exact``) is asked one prompt at a time, with a pause after
each if that's asked for: one that it doesn't know, one whose first half is that of a prompt before, as questions about
one document are, and one that came before as a whole. What was found is what ``usage`` says (``cached_tokens``); where
that isn't what should be, the program ends with an error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from child import adopt_orphans
from load import send_at_once
from rich.console import Console
from rich.progress import track
from rich.table import Table
from serving_times import server

from shoal_lab.bench.workload import PlannedRequest

_BLOCK_TOKENS, _OUTPUT_TOKENS = 16, 4
_CASES = ("unknown", "half known", "known")


def main() -> None:
    options = _options()
    adopt_orphans()
    with server(options.skip_layers, "--reuse", "exact") as url:
        rounds = asyncio.run(_rounds(url, options))
    table = Table("prompt", "cached", "first token", "of an unknown one's", title=f"{options.prompt_tokens} tokens")
    shares = {}
    for case in _CASES:
        found = [one[case] for one in rounds]
        shares[case] = statistics.median(one[case]["ttft_s"] / one["unknown"]["ttft_s"] for one in rounds)
        ttft_s = statistics.median(one["ttft_s"] for one in found)
        table.add_row(case, str(found[0]["cached_tokens"]), f"{1e3 * ttft_s:.0f} ms", f"{shares[case]:.0%}")
    Console().print(table)
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        document = {"settings": settings, "of_unknown": shares, "rounds": rounds}
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


async def _rounds(url: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    size, half = options.prompt_tokens, options.prompt_tokens // 2

    async def ask(prompt: tuple[int, ...], at_least_cached: int) -> dict[str, Any]:
        found = await _ask(url, prompt, at_least_cached)
        await asyncio.sleep(options.pause_s)
        return found

    await ask(_prompt(0, size), 0)
    rounds = []
    for number in track(range(options.rounds), description="rounds", console=Console(stderr=True)):
        first, other = _prompt(2 * number + 1, size), _prompt(2 * number + 2, size)
        rounds.append(
            {
                "unknown": await ask(first, 0),
                "half known": await ask(first[:half] + other[half:], half - _BLOCK_TOKENS),
                "known": await ask(first, size - 1 - _BLOCK_TOKENS),
            }
        )
    return rounds


def _prompt(number: int, num_tokens: int) -> tuple[int, ...]:
    """No two share a beginning."""
    return tuple(1000 + (7919 * number + 104_729 * index) % 40_000 for index in range(num_tokens))


async def _ask(url: str, prompt: tuple[int, ...], at_least_cached: int) -> dict[str, Any]:
    [record] = await send_at_once(url, [PlannedRequest(0, "alone", prompt, len(prompt), _OUTPUT_TOKENS)])
    cached = record.cached_tokens
    if cached is None or not at_least_cached <= cached <= at_least_cached + _BLOCK_TOKENS:
        sys.exit(f"error: {cached} tokens were found, and {at_least_cached} or a few more should be")
    return {"ttft_s": record.ttft_s, "cached_tokens": cached}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=1800)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pause-s", type=float, default=0.0, help="between two prompts")
    parser.add_argument("--skip-layers", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write raw figures here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
