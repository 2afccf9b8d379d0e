"""How much of the time per output token isn't the engine's: the way of tokens from decode to a client.

    python tests/benchmarks/token_path.py [--streams 1 8 32] [--beside OTHER/services] [--json FILE]
    python tests/benchmarks/token_path.py --stream-intervals 1 4

Starts ``shoal serve``, asks it by several streams at once over HTTP, and compares the client's time per output token
with the mean step of decode's engine meanwhile, which decode's own metrics tell, and with what the same steps take this
checkout's engine alone, once the server is gone (engine_alone.py). All processes and the client share this machine's
cores, so work on the way slows the steps down, too: what a token takes beyond the engine alone is all that gateway,
Serve and the client cost. With ``--beside``, another checkout is measured in turns with this one, and the tokens a
second of both are what counts. So are those of several ``--stream-intervals``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from child import adopt_orphans, clean_environment, free_port, serving
from load import LoadOptions, Loads, send_at_once, span_s
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import track
from rich.table import Table

_STEP = "shoal_decode_step_seconds"
_HERE = str(Path(__file__).parents[2] / "services")


@dataclass(frozen=True, slots=True)
class Figures:
    """``tpot_s`` is the streams' median, ``step_s`` the mean of the steps that ran meanwhile, ``alone_s`` the median
    of the same steps by the engine alone, right afterwards."""

    tpot_s: float
    step_s: float
    alone_s: float
    tokens_per_s: float

    @property
    def between_steps(self) -> float:
        """The share of the time per token in which no step ran."""
        return 1 - self.step_s / self.tpot_s

    @property
    def overhead(self) -> float:
        """The share of the time per token that the engine alone wouldn't take."""
        return 1 - self.alone_s / self.tpot_s


def main() -> None:
    options = _options()
    adopt_orphans()
    trees = {_name("this", interval): (_HERE, interval) for interval in options.stream_intervals}
    if options.beside:
        trees["beside"] = (options.beside, 1)
    found: dict[tuple[str, int], list[Figures]] = defaultdict(list)
    order = [(number, name) for number in range(options.rounds) for name in _turned(list(trees), number)]
    for number, name in track(order, description="rounds", console=Console(stderr=True)):
        for streams, figures in _measure(*trees[name], options, number).items():
            found[name, streams].append(figures)
    if options.json:
        raw = [
            {
                "tree": name,
                "streams": streams,
                "rounds": [
                    asdict(one) | {"between_steps": one.between_steps, "overhead": one.overhead} for one in rounds
                ],
            }
            for (name, streams), rounds in found.items()
        ]
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        settings["beside"] = bool(options.beside)
        Path(options.json).write_text(json.dumps({"settings": settings, "figures": raw}, indent=2) + "\n")
    table = Table("tree", "streams", "per token", "a step", "engine alone", "between steps", "beyond alone", "tokens/s")
    for (name, streams), rounds in sorted(found.items(), key=lambda item: (item[0][1], item[0][0])):
        keys = ("tpot_s", "step_s", "alone_s", "between_steps", "overhead", "tokens_per_s")
        tpot, step, alone, between, overhead, rate = (
            statistics.median(getattr(one, key) for one in rounds) for key in keys
        )
        times = (f"{1000 * seconds:.1f} ms" for seconds in (tpot, step, alone))
        table.add_row(name, str(streams), *times, f"{between:.0%}", f"{overhead:.0%}", f"{rate:.0f}")
    Console().print(table)


def _turned(names: list[str], number: int) -> list[str]:
    return names if number % 2 == 0 else names[::-1]


def _name(tree: str, stream_interval: int) -> str:
    return tree if stream_interval == 1 else f"{tree}, {stream_interval} steps a message"


def _measure(tree: str, stream_interval: int, options: argparse.Namespace, number: int) -> dict[int, Figures]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-c", "from shoal.command import main; main()", "serve", "--dtype", "bfloat16",
        "--port", str(port), "--grpc-port", "0",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="shoal-tokens-") as folder:
        path = os.pathsep.join([tree, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        environment = {"PYTHONPATH": path}
        if stream_interval > 1:  # another checkout may not know it
            environment["SHOAL_DECODE__STREAM_INTERVAL"] = str(stream_interval)
        with serving(command, environment, Path(folder) / "log", url, "/readyz", 400):
            asked = asyncio.run(_ask_all(url, options, number))
    alone = _alone_s(options)
    return {streams: Figures(tpot_s, step_s, alone[streams], rate) for streams, (tpot_s, step_s, rate) in asked.items()}


def _alone_s(options: argparse.Namespace) -> dict[int, float]:
    command = [
        sys.executable, str(Path(__file__).with_name("engine_alone.py")), "--streams", *map(str, options.streams),
        "--prompt-tokens", str(options.prompt_tokens), "--output-tokens", str(options.output_tokens),
    ]  # fmt: skip
    done = subprocess.run(command, env=clean_environment(), stdout=subprocess.PIPE, text=True, check=True)
    return {int(streams): seconds for streams, seconds in json.loads(done.stdout.splitlines()[-1]).items()}


async def _ask_all(url: str, options: argparse.Namespace, number: int) -> dict[int, tuple[float, float, float]]:
    """By streams: time per token, the mean step, tokens a second."""
    load = LoadOptions(stream_prompt_tokens=options.prompt_tokens, stream_output_tokens=options.output_tokens)
    loads = Loads(range(1000, 9000), load, seed=number)
    await send_at_once(url, loads.together("warm-up", max(options.streams), 8))
    figures = {}
    for streams in options.streams:
        before = _steps(url)
        records = await send_at_once(url, loads.together(f"round {number}", streams))
        seconds, steps = (now - then for now, then in zip(_steps(url), before, strict=True))
        tpot_s = statistics.median(record.tpot_s for record in records if record.tpot_s is not None)
        tokens_per_s = sum(one.output_tokens for one in records) / span_s(records)
        figures[streams] = (tpot_s, seconds / steps, tokens_per_s)
    return figures


def _steps(url: str) -> tuple[float, float]:
    """Seconds in steps, and their number, of all decode replicas so far."""
    sums = {f"{_STEP}_sum": 0.0, f"{_STEP}_count": 0.0}
    with httpx.Client(trust_env=False, timeout=10) as client:
        for target in (one for group in client.get(f"{url}/metrics/targets").json() for one in group["targets"]):
            for family in text_string_to_metric_families(client.get(f"http://{target}/metrics").text):
                for sample in family.samples:
                    if sample.name in sums:
                        sums[sample.name] += sample.value
    return sums[f"{_STEP}_sum"], sums[f"{_STEP}_count"]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--stream-intervals", type=int, nargs="+", default=[1], help="steps whose tokens leave in one message"
    )
    parser.add_argument("--beside", help="the services folder of another checkout, to measure in turns")
    parser.add_argument("--json", help="write raw figures here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
