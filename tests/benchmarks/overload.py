"""How many requests are answered in time when more come than can be answered.

    python tests/benchmarks/overload.py [--timeout-s 10] [--json FILE] [--svg FILE]

First a closed loop finds what the server can do: so many clients, each with one request at a time, and the answers a
second that they get. Then requests arrive by a Poisson process, at a half, once, twice and three times that rate. Each
client gives up after ``--timeout-s``, and an answer counts if it is complete by then. Once all of them say so to the
server (the header ``x-shoal-timeout``), which then refuses at once whom it would serve too late; and once they don't.
The two take turns, load by load.

What comes before ``--settle-s`` doesn't count: it takes a while until it shows that more comes than can be done. Leave
the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from child import adopt_orphans, serving

from shoal.cluster.ports import free_port
from shoal_lab.bench.clock import RealClock
from shoal_lab.bench.endpoint import EndpointOptions, open_endpoint
from shoal_lab.bench.generator import Amount, Generator
from shoal_lab.bench.load import Load
from shoal_lab.bench.mix import Slo, parse_mix
from shoal_lab.bench.record import Failure, Record
from shoal_lab.bench.workload import PromptKind, Workload
from shoal_lab.report.plots import Line, line_plot

_START_WITHIN_S = 400.0
_NO_SLO = Slo(1e9, 1e9)


@dataclass(frozen=True, slots=True)
class Found:
    """Of one load, a multiple of the capacity. Rates are requests a second."""

    tells_timeout: bool
    load: float
    rate: float
    in_time: float
    refused: float
    late: float
    failures: dict[str, int]


class Run:
    def __init__(self, url: str, options: argparse.Namespace) -> None:
        self._url, self._options = url, options

    async def capacity(self) -> float:
        """Answers a second, by so many clients at a time that the server always has something to do."""
        options = self._options
        records = await self._records(
            Load(concurrency=options.concurrency), Amount(2 * options.concurrency, duration_s=options.duration_s),
            timeout_s=300, tells_timeout=False,
        )  # fmt: skip
        # While all clients have a request: what is left at the end is answered with less and less beside it.
        first_s, last_s = (limit(one.sent_s for one in records if one.is_counted) for limit in (min, max))
        ended = [one.sent_s + one.e2e_s for one in records if one.e2e_s is not None]
        return sum(first_s <= end_s <= last_s for end_s in ended) / (last_s - first_s)

    async def overload(self, load: float, capacity: float, *, tells_timeout: bool) -> Found:
        options, rate = self._options, load * capacity
        records = await self._records(
            Load(rate=rate), Amount(round(rate * options.settle_s), duration_s=options.duration_s),
            timeout_s=options.timeout_s, tells_timeout=tells_timeout,
        )  # fmt: skip
        counted = [one for one in records if one.is_counted]
        failures = Counter(str(one.failure) for one in counted if one.failure is not None)

        def rate_of(number: int) -> float:
            return round(rate * number / len(counted), 3)

        return Found(
            tells_timeout,
            load,
            round(rate, 3),
            in_time=rate_of(sum(one.failure is None for one in counted)),
            refused=rate_of(failures[Failure.REJECTED]),
            late=rate_of(failures[Failure.TIMEOUT]),
            failures=dict(failures),
        )

    async def _records(
        self, load: Load, amount: Amount, *, timeout_s: float, tells_timeout: bool
    ) -> tuple[Record, ...]:
        options, clock = self._options, RealClock()
        asked = EndpointOptions(self._url, timeout_s=timeout_s, tells_timeout=tells_timeout)
        mix = parse_mix(options.mix, _NO_SLO)
        workload = Workload(mix, prompts=PromptKind.IDS, token_ids=(1000, 30_000), seed=options.seed)
        async with open_endpoint(asked, clock) as endpoint:
            sent = await Generator(endpoint, workload, amount, clock).run(load, lambda done, total: None)
        return sent.records


async def measure(url: str, options: argparse.Namespace) -> tuple[float, list[Found]]:
    run, found = Run(url, options), []
    capacity = await run.capacity()
    print(f"{options.concurrency} clients at a time get {capacity:.2f} answers a second", flush=True)
    for load in options.loads:
        for tells_timeout in (True, False):
            one = await run.overload(load, capacity, tells_timeout=tells_timeout)
            found.append(one)
            print(
                f"{'told' if tells_timeout else 'not told'}, {one.rate:.2f} a second ({load:g} x): "
                f"{one.in_time:.2f} in time, {one.refused:.2f} refused, {one.late:.2f} late",
                flush=True,
            )
    return capacity, found


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="shoal-overload-") as folder:
        port = free_port("127.0.0.1")
        url = f"http://127.0.0.1:{port}"
        command = [
            sys.executable, "-c", "from shoal.cli.command import main; main()", "serve", "--port", str(port),
            "--grpc-port", "0",
        ]  # fmt: skip
        log = Path(folder) / "server.log"
        with serving(command, {"OMP_WAIT_POLICY": "passive"}, log, url, "/readyz", _START_WITHIN_S):
            capacity, found = asyncio.run(measure(url, options))
    if options.json is not None:
        options.json.write_text(json.dumps(_document(options, capacity, found), indent=2) + "\n", encoding="utf-8")
    if options.svg is not None:
        options.svg.write_text(_plot(capacity, found) + "\n", encoding="utf-8")


def _document(options: argparse.Namespace, capacity: float, found: Sequence[Found]) -> dict[str, object]:
    kept = ("mix", "timeout_s", "concurrency", "duration_s", "settle_s", "seed", "note")
    return {
        "settings": {name: getattr(options, name) for name in kept},
        "threads": len(os.sched_getaffinity(0)),
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "capacity": round(capacity, 3),
        "found": [asdict(one) for one in found],
    }


def _plot(capacity: float, found: Sequence[Found]) -> str:
    def line(label: str, tells_timeout: bool) -> Line:
        mine = [one for one in found if one.tells_timeout is tells_timeout]
        return Line(label, [one.load for one in mine], [one.in_time / capacity for one in mine])

    return line_plot(
        [line("clients say how long they wait", True), line("clients just leave", False)],
        x_label="asked for, over what can be answered",
        y_label="answered in time, over that",
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mix", default="512:32", help="as for shoal bench; default: %(default)s")
    parser.add_argument("--timeout-s", type=float, default=10.0, help="how long clients wait; default: %(default)s")
    parser.add_argument("--concurrency", type=int, default=16, help="of the closed loop; default: %(default)s")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 1.0, 2.0, 3.0], metavar="MULTIPLE")
    parser.add_argument("--duration-s", type=float, default=45.0, help="of each load; default: %(default)s")
    parser.add_argument("--settle-s", type=float, default=20.0, help="before it; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="kept with the figures: what else ran on the machine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found here")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="and draw it here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
