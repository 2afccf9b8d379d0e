"""How long a decode step takes, by the number of streams, with Shoal's kernels (weights in int8, too, and with the
whole head where greedy answers read half of it) and with torch's, in one run.

    python tests/benchmarks/decode.py [--context 1800] [--streams 1 8 32] [--json FILE]

Every stream holds ``--context`` tokens of text and goes on, greedily or with ``--temperature`` and ``--top-p``; a step
gives each of them one token. The engines take turns, some steps each, so that a drift of the machine meets them alike.
Beside each time stands what share of the memory's read rate it is to read all weights that a step reads, and the K/V of
all streams, once. Int8 is measured in bfloat16 alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from machine_limits import memory_read_bytes_per_s
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from texts import prompts

from shoal.backends.cpu.native_steps import MAX_SHORTLIST_ROWS, NativeSteps
from shoal.config import ShoalConfig, load_config
from shoal.engine.build import Served, build_engine, load_parameters
from shoal.engine.engine import Engine
from shoal.model.files import locate
from shoal.model.int8 import Int8Matrix
from shoal.model.shortlist import Shortlist
from shoal.wire.messages import Depth, SamplingParams, Stage

CPU = torch.device("cpu")
# A stream's for the 4,096 tokens that it may generate, in blocks of 16.
_BLOCKS_TO_SPARE = 257


@dataclass(frozen=True)
class Variant:
    """``weight_bytes`` are what a step reads that doesn't go by the ``shortlist``."""

    engine: Engine
    weight_bytes: int
    shortlist: Shortlist | None = None

    @property
    def goes_by_shortlist(self) -> bool:
        """Its next step may, if it's greedy and of few rows."""
        path = self.engine.runner.decode_path
        return self.shortlist is not None and isinstance(path, NativeSteps) and not path.num_without_it

    def read_bytes(self, *, by_shortlist: bool) -> int:
        if self.shortlist is None or not by_shortlist:
            return self.weight_bytes
        return self.weight_bytes - self.shortlist.head.values.nbytes + self.shortlist.num_bytes

    def take_turn(self) -> None:
        if isinstance(path := self.engine.runner.decode_path, NativeSteps):
            path.shortlist = self.shortlist
        self.engine.step()  # the others' data left the caches


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    config = load_config(model={"skip_layers": options.skip_layers, "dtype": options.dtype})
    served = Served.of(config)
    variants = _variants(config, served, options)
    rows, bandwidth = [], memory_read_bytes_per_s()
    for streams in options.streams:
        seconds, shares = _steps(variants, streams, options)
        for name, times in seconds.items():
            variant, median = variants[name], statistics.median(times)
            kv_bytes = streams * options.context * variant.engine.scheduler.layout.token_bytes
            rows.append(
                {
                    "streams": streams, "kernels": name, "median_s": median, "seconds": times,
                    "tokens_per_s": streams / median, "share_by_shortlist": shares[name],
                    "share_of_bandwidth":
                        (variant.read_bytes(by_shortlist=shares[name] > 0.5) + kv_bytes) / median / bandwidth,
                }
            )  # fmt: skip
    result = {
        "settings": {name: value for name, value in vars(options).items() if name != "json"},
        "model": served.name,
        "weight_bytes": {name: variant.weight_bytes for name, variant in variants.items()},
        "read_bytes_per_s": bandwidth,
        "rows": rows,
    }
    _show(result)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


def _variants(config: ShoalConfig, served: Served, options: Any) -> dict[str, Variant]:
    blocks = max(options.streams) * (options.context // config.decode.block_tokens + _BLOCKS_TO_SPARE)
    limits = {"num_blocks": blocks, "max_sequences": max(options.streams)}
    plain = load_parameters(served, Stage.DECODE, CPU)
    held = {"Shoal's": plain}
    if options.dtype == "bfloat16":
        held["Shoal's, int8"] = load_parameters(served, Stage.DECODE, CPU, hold=Int8Matrix.of)
    held["torch's"] = plain
    variants = {}
    for name, parameters in held.items():
        decode = {"kernels": "torch" if name == "torch's" else "auto", **limits}
        own = config.model_copy(update={"decode": config.decode.model_copy(update=decode)})
        engine = build_engine(own, Stage.DECODE, served, parameters, device=CPU)
        path = engine.runner.decode_path
        shortlist = path.shortlist if isinstance(path, NativeSteps) else None
        # No decode step projects.
        read = sum(tensor.nbytes for part, tensor in parameters.tensors() if not part.startswith("projection."))
        variants[name] = Variant(engine, read, shortlist)
        if shortlist is not None:  # the same engine, so that nothing else differs
            variants["Shoal's, whole head"] = Variant(engine, read)
    return variants


def _steps(variants: dict[str, Variant], streams: int, options: Any) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each step, and which share of them went by a shortlist."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    num_by_shortlist = dict.fromkeys(variants, 0)
    may_go_by_it = streams <= MAX_SHORTLIST_ROWS and not options.temperature
    with ExitStack() as stack:
        for engine in dict.fromkeys(variant.engine for variant in variants.values()):
            stack.enter_context(_filled(engine, streams, options))
        for _ in track(range(options.rounds), description=f"{streams} streams"):
            for name, variant in variants.items():
                variant.take_turn()
                for _ in range(options.steps):
                    num_by_shortlist[name] += may_go_by_it and variant.goes_by_shortlist
                    started = time.perf_counter()
                    output = variant.engine.step()
                    seconds[name].append(time.perf_counter() - started)
                    if len(output.tokens) != streams:
                        raise SystemExit(f"{len(output.tokens)} tokens of {streams} streams: raise the pool")
    return seconds, {name: number / len(seconds[name]) for name, number in num_by_shortlist.items()}


@contextmanager
def _filled(engine: Engine, streams: int, options: Any) -> Iterator[None]:
    """The streams' prompts are computed, each but its last token."""
    text = locate("smollm2").tokenizer().encode("\n\n".join(prompts().values()))
    sampling = SamplingParams(max_tokens=4096, temperature=options.temperature, top_p=options.top_p, ignore_eos=True)
    for index in range(streams):
        prompt = tuple(islice(cycle(text), index * 311, index * 311 + options.context))
        engine.submit_generate(str(index), prompt, Depth.SHALLOW, sampling)
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
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", help="write the raw figures here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
