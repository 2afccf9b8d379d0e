"""How long a decode step takes, by the number of streams, with Shoal's kernels and with torch's, in one run.

    python tests/benchmarks/decode.py [--context 1800] [--streams 1 8 32] [--json FILE]

Every stream holds ``--context`` tokens and goes on greedily; a step gives each of them one token. Both engines take
turns, some steps each, so that a drift of the machine meets them alike. Beside each time stands what share of the
memory's read rate it is to read all weights, and the K/V of all streams, once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from machine_limits import memory_read_bytes_per_s
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from shoal.config import load_config
from shoal.engine.build import Served, build_engine, load_parameters
from shoal.engine.engine import Engine
from shoal.messages import Depth, SamplingParams, Stage

KERNELS = ("auto", "torch")
NAMES = {"auto": "Shoal's", "torch": "torch's"}


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    config = load_config(model={"skip_layers": options.skip_layers, "dtype": options.dtype})
    served = Served.of(config)
    parameters = load_parameters(served, Stage.DECODE, torch.device("cpu"))
    blocks = max(options.streams) * (options.context + 4096) // config.decode.block_tokens
    limits = {"num_blocks": blocks, "max_sequences": max(options.streams)}
    engines = {}
    for kernels in KERNELS:
        own = config.model_copy(update={"decode": config.decode.model_copy(update={"kernels": kernels, **limits})})
        engines[kernels] = build_engine(own, Stage.DECODE, served, parameters, device=torch.device("cpu"))
    rows, bandwidth = [], memory_read_bytes_per_s()
    for streams in options.streams:
        seconds = _steps(engines, streams, options)
        kv_bytes = streams * options.context * engines["auto"].scheduler.layout.token_bytes
        for kernels, times in seconds.items():
            median = statistics.median(times)
            rows.append(
                {
                    "streams": streams, "kernels": NAMES[kernels], "median_s": median, "seconds": times,
                    "tokens_per_s": streams / median,
                    "share_of_bandwidth": (parameters.num_bytes + kv_bytes) / median / bandwidth,
                }
            )  # fmt: skip
    result = {
        "settings": {name: value for name, value in vars(options).items() if name != "json"},
        "model": served.name,
        "read_bytes_per_s": bandwidth,
        "rows": rows,
    }
    _show(result)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


def _steps(engines: dict[str, Engine], streams: int, options: Any) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {kernels: [] for kernels in engines}
    with _filled(engines["auto"], streams, options), _filled(engines["torch"], streams, options):
        for _ in track(range(options.rounds), description=f"{streams} streams"):
            for kernels, engine in engines.items():
                engine.step()  # the other one's data left the caches
                for _ in range(options.steps):
                    started = time.perf_counter()
                    output = engine.step()
                    seconds[kernels].append(time.perf_counter() - started)
                    if len(output.tokens) != streams:
                        raise SystemExit(f"{len(output.tokens)} tokens of {streams} streams: raise the pool")
    return seconds


@contextmanager
def _filled(engine: Engine, streams: int, options: Any) -> Iterator[None]:
    """The streams' prompts are computed, each but its last token."""
    generator = torch.Generator().manual_seed(0)
    sampling = SamplingParams(max_tokens=4096, temperature=0.0, ignore_eos=True)
    for index in range(streams):
        prompt = torch.randint(20, 40_000, (options.context,), generator=generator).tolist()
        engine.submit_generate(str(index), tuple(prompt), Depth.SHALLOW, sampling)
    while len(engine.step().tokens) < streams:
        pass
    yield
    for index in range(streams):
        engine.finish(str(index))


def _show(result: dict[str, Any]) -> None:
    context = result["settings"]["context"]
    table = Table(title=f"{result['model']}, a decode step at {context:,} tokens of context each")
    for column in ("streams", "kernels", "median ms", "tokens/s", "of memory's read rate"):
        table.add_column(column, justify="left" if column == "kernels" else "right")
    for row in result["rows"]:
        table.add_row(
            str(row["streams"]), row["kernels"], f"{row['median_s'] * 1e3:.1f}", f"{row['tokens_per_s']:.0f}",
            f"{row['share_of_bandwidth']:.2f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"memory is read at {result['read_bytes_per_s'] / 1e9:.0f} GB/s")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=1800, help="tokens that each stream holds")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="steps of each engine in a round")
    parser.add_argument("--skip-layers", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", help="write the raw figures here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
