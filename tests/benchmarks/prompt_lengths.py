"""What prompts of many lengths leave in a process: products, compiled for each number of rows that came, and kept.

    python tests/benchmarks/prompt_lengths.py [--lengths 200] [--json FILE]

A prefill engine runs prompts of so many different lengths, each twice, in a process that keeps what torch and oneDNN
keep by themselves, and in one that keeps what a replica does (app/graph.py). Both tell how much memory of their own
they have come to, and how long a prompt takes when its length is new and when it was there just now.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

_LOOKS = 8
_SHORTEST, _LONGEST = 256, 1024
_THREADS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "5000"}


def measure(num_lengths: int, seed: int) -> dict[str, Any]:
    """In this process: its memory (MiB) by the number of lengths that came, and seconds."""
    from footprint import Footprint
    from step_times import Grid, config_for, make_engine, run_prompt

    from shoal.wire.messages import Stage

    grid = Grid((_LONGEST,), _LONGEST, (1,), (16,), rounds=1, steps=1)
    engine = make_engine(config_for(10, grid), Stage.PREFILL)
    run_prompt(engine, "first of all", _LONGEST, _LONGEST)
    lengths = random.Random(seed).sample(range(_SHORTEST, _LONGEST), num_lengths)
    memory, times = [], []
    for number, length in enumerate(track(lengths, "prompts", console=Console(stderr=True))):
        if number % max(1, num_lengths // _LOOKS) == 0:
            memory.append((number, Footprint.of(os.getpid()).memory_bytes / (1 << 20)))
        times.append([run_prompt(engine, f"{number}, {again}", length, _LONGEST)[0][2] for again in range(2)])
    memory.append((num_lengths, Footprint.of(os.getpid()).memory_bytes / (1 << 20)))
    return {
        "memory_mib": memory,
        "new_s": statistics.median(new for new, _ in times),
        "known_s": statistics.median(known for _, known in times),
        "slower_s": statistics.median(new - known for new, known in times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    parser.add_argument("--here", action="store_true", help="measure in this process, and print JSON")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure(arguments.lengths, arguments.seed)))
        return
    from shoal.cluster.graph import KEPT_PRODUCTS

    found = {
        name: _child(arguments.lengths, arguments.seed, kept)
        for name, kept in (("as the libraries do", {}), ("as a replica does", KEPT_PRODUCTS))
    }
    _show(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _child(num_lengths: int, seed: int, kept: Mapping[str, str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--here", "--lengths", str(num_lengths), "--seed", str(seed)]
    done = subprocess.run(command, env={**os.environ, **_THREADS, **kept}, stdout=subprocess.PIPE, check=True)
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def _show(found: Mapping[str, dict[str, Any]]) -> None:
    table = Table("products are kept", "memory at first (MiB)", "at the end", "new length (ms)", "known", "slower")
    for name, one in found.items():
        table.add_row(
            name, *(f"{one['memory_mib'][place][1]:.0f}" for place in (0, -1)),
            *(f"{1000 * one[key]:.1f}" for key in ("new_s", "known_s", "slower_s")),
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
