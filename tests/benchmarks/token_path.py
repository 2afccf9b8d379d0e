"""How much of the time per output token isn't the engine's: the way of tokens from decode to a client.

    python tests/benchmarks/token_path.py [--streams 1 8 32] [--beside OTHER/services] [--json FILE]
    python tests/benchmarks/token_path.py --stream-intervals 1 4

Starts ``shoal serve``, asks it by several streams at once over HTTP, and compares the client's time per token with the
mean step of decode's engine meanwhile, which decode's own metrics tell, and with what the same steps take an engine
alone (engine_alone.py). All processes and the client share this machine's cores, so work on the way slows the steps
down, too: what a token takes beyond the engine alone is all that gateway, Serve and the client cost. The client's own
part of the cores' time is told beside it. The machine drifts, so both come within seconds of each other, again and
again: after each load, all of the server's processes are stopped, the engine takes its steps, and the server goes on.

With ``--beside``, another checkout is measured in turns with this one, and the tokens a second of both are what counts.
So are those of several ``--stream-intervals``. The engine alone is always this checkout's.
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
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from child import adopt_orphans, clean_environment, serving, stopped
from load import LoadOptions, Loads, send_at_once, span_s
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import track
from rich.table import Table

from shoal.cluster.ports import free_port

_STEP = "shoal_decode_step_seconds"
_HERE = str(Path(__file__).parents[2] / "services")


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one load: ``tpot_s`` is the streams' median, ``step_s`` the mean of the steps that ran meanwhile, ``alone_s``
    that of the same steps by the engine alone, right afterwards. ``client`` is this process' share of the cores' time.
    """

    tpot_s: float
    step_s: float
    alone_s: float
    client: float
    tokens_per_s: float

    @property
    def between_steps(self) -> float:
        """The share of the time per token in which no step ran."""
        return 1 - self.step_s / self.tpot_s

    @property
    def beyond_alone(self) -> float:
        """The share of the time per token that the engine alone wouldn't take."""
        return 1 - self.alone_s / self.tpot_s

    @property
    def without_client(self) -> float:
        """The same less the client's own share: what gateway and Serve cost."""
        return self.beyond_alone - self.client


_DERIVED = ("between_steps", "beyond_alone", "without_client")


def main() -> None:
    options = _options()
    adopt_orphans()
    trees = {_name("this", interval): (_HERE, interval) for interval in options.stream_intervals}
    if options.beside:
        trees["beside"] = (options.beside, 1)
    found: dict[tuple[str, int], list[Figures]] = defaultdict(list)
    order = [(number, name) for number in range(options.rounds) for name in _turned(list(trees), number)]
    for number, name in track(order, description="servers", console=Console(stderr=True)):
        for streams, turns in _measure(*trees[name], options, number).items():
            found[name, streams] += turns
    if options.json:
        raw = [
            {
                "tree": name,
                "streams": streams,
                "turns": [asdict(one) | {key: getattr(one, key) for key in _DERIVED} for one in turns],
            }
            for (name, streams), turns in found.items()
        ]
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        settings["beside"] = bool(options.beside)
        Path(options.json).write_text(json.dumps({"settings": settings, "figures": raw}, indent=2) + "\n")
    table = Table("tree", "streams", "token, ms", "step", "alone", "beyond, %", "client", "the rest", "tokens/s")
    for (name, streams), turns in sorted(found.items(), key=lambda item: (item[0][1], item[0][0])):
        times = (f"{1000 * _median(turns, key):.1f}" for key in ("tpot_s", "step_s", "alone_s"))
        shares = (_percent(turns, key) for key in ("beyond_alone", "client", "without_client"))
        table.add_row(name, str(streams), *times, *shares, f"{_median(turns, 'tokens_per_s'):.0f}")
    Console().print(table)


def _median(turns: list[Figures], key: str) -> float:
    return float(statistics.median(getattr(one, key) for one in turns))


def _percent(turns: list[Figures], key: str) -> str:
    """The median, and the least and the most."""
    values = [100 * getattr(one, key) for one in turns]
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def _turned(names: list[str], number: int) -> list[str]:
    return names if number % 2 == 0 else names[::-1]


def _name(tree: str, stream_interval: int) -> str:
    return tree if stream_interval == 1 else f"{tree}, {stream_interval} steps a message"


def _measure(tree: str, stream_interval: int, options: argparse.Namespace, number: int) -> dict[int, list[Figures]]:
    port = free_port("127.0.0.1")
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-c", "from shoal.cli.command import main; main()", "serve", "--dtype", "bfloat16",
        "--port", str(port), "--grpc-port", "0", "--skip-layers", "10",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="shoal-tokens-") as folder:
        path = os.pathsep.join([tree, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        environment = {"PYTHONPATH": path}
        if stream_interval > 1:  # another checkout may not know it
            environment["SHOAL_DECODE__STREAM_INTERVAL"] = str(stream_interval)
        with serving(command, environment, Path(folder) / "log", url, "/readyz", 400), _engine(options) as engine:
            return _ask_all(url, engine, options, number)


def _engine(options: argparse.Namespace) -> subprocess.Popen[str]:
    """An engine alone, that waits to be asked."""
    command = [
        sys.executable, str(Path(__file__).with_name("engine_alone.py")), "--max-streams", str(max(options.streams)),
        "--prompt-tokens", str(options.prompt_tokens), "--output-tokens", str(options.output_tokens),
    ]  # fmt: skip
    return subprocess.Popen(
        command, env=clean_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def _alone_s(engine: subprocess.Popen[str], streams: int) -> float:
    assert engine.stdin and engine.stdout
    engine.stdin.write(f"{streams}\n")
    if not (line := engine.stdout.readline()):
        sys.exit("error: the engine alone ended; its last words are above")
    return float(line)


def _ask_all(
    url: str, engine: subprocess.Popen[str], options: argparse.Namespace, number: int
) -> dict[int, list[Figures]]:
    """By streams, what each turn found."""
    load = LoadOptions(stream_prompt_tokens=options.prompt_tokens, stream_output_tokens=options.output_tokens)
    loads = Loads(range(1000, 9000), load, seed=number)
    asyncio.run(send_at_once(url, loads.together("warm-up", max(options.streams), 8)))
    for streams in options.streams:
        _alone_s(engine, streams)
    figures: dict[int, list[Figures]] = {streams: [] for streams in options.streams}
    for turn in range(options.turns):
        for streams in options.streams:
            requests = loads.together(f"turn {turn}", streams)
            before, client_s, began_s = _steps(url), time.process_time(), time.perf_counter()
            records = asyncio.run(send_at_once(url, requests))
            client_s, took_s = time.process_time() - client_s, time.perf_counter() - began_s
            seconds, steps = (now - then for now, then in zip(_steps(url), before, strict=True))
            with stopped(keep=engine.pid):
                alone_s = _alone_s(engine, streams)
            tpot_s = statistics.median(record.tpot_s for record in records if record.tpot_s is not None)
            client = client_s / took_s / len(os.sched_getaffinity(0))
            tokens_per_s = sum(one.output_tokens for one in records) / span_s(records)
            figures[streams].append(Figures(tpot_s, seconds / steps, alone_s, client, tokens_per_s))
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
    parser.add_argument("--rounds", type=int, default=3, help="servers of each tree")
    parser.add_argument("--turns", type=int, default=3, help="loads of each number of streams, by each server")
    parser.add_argument(
        "--stream-intervals", type=int, nargs="+", default=[1], help="steps whose tokens leave in one message"
    )
    parser.add_argument("--beside", help="the services folder of another checkout, to measure in turns")
    parser.add_argument("--json", help="write raw figures here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
