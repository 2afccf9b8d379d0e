"""Is the simulation right? Real servers of this machine under load, beside the simulation of the very same requests.

    python tests/benchmarks/step_costs.py --json step-costs.json
    python tests/benchmarks/simulation_check.py step-costs.json [--ratio 1:1 2:2] [--rates 0.5 1 2 3] [--json FILE]

For each ratio of prefill to decode replicas, 1P1D and 2P2D by default, a server is started and asked by the code of
``shoal bench``, one rate after another; the simulation gets the same seed, mix and rates, and the machine's cores to
share. Printed side by side, with the simulation's error: relative for times and goodput, in points for the share within
both SLOs. By default both fill one replica before another, as replicas of the same cores do; with ``--spread`` they
share what comes. The generator shares the machine with the server, and the costs of serving have it in them. Leave the
machine alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from arms import MODEL_NAME
from child import adopt_orphans
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from serving_times import server
from simulation.costs import StepCosts, read_costs
from simulation.plan import Outcome, PlanOptions, simulate
from simulation.system import Fleet

from shoal.config import ShoalConfig, StageConfig
from shoal_lab.bench.benchmark import Benchmark, BenchOptions
from shoal_lab.bench.benchmark import measure as measure_loads
from shoal_lab.bench.clock import RealClock
from shoal_lab.bench.endpoint import EndpointOptions, open_endpoint
from shoal_lab.bench.generator import Amount
from shoal_lab.bench.level import Level
from shoal_lab.bench.load import Load
from shoal_lab.bench.mix import Slo, parse_mix


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one rate. Seconds; ``attained`` is the share within both SLOs."""

    ttft_p50_s: float | None
    ttft_p90_s: float | None
    tpot_p50_s: float | None
    attained: float
    num_failed: int

    @classmethod
    def of(cls, level: Level) -> Figures:
        overall = level.overall
        return cls(
            overall.ttft_s.p50, overall.ttft_s.p90, overall.tpot_s.p50, overall.attained.value, overall.num_failed
        )


@dataclass(frozen=True, slots=True)
class Compared:
    """One fleet: real and simulated figures by rate, and the goodput of each."""

    num_prefill: int
    num_decode: int
    rates: tuple[float, ...]
    real: tuple[Figures, ...]
    simulated: tuple[Figures, ...]
    real_goodput: float
    simulated_goodput: float
    warnings: tuple[str, ...]


def compare(
    costs: StepCosts, options: argparse.Namespace, ratio: tuple[int, int], on_step: Callable[[], None]
) -> Compared:
    """Run both. The real one first: the simulation would take its cores."""
    asked = _bench_options(options)
    told = dict.fromkeys(("SHOAL_PREFILL__PACK_UP_TO", "SHOAL_DECODE__PACK_UP_TO"), "0") if options.spread else {}
    with server(options.skip_layers, ratio[0], num_decode=ratio[1], environment=told) as url:
        real = asyncio.run(_measure(replace(asked, endpoint=EndpointOptions(url, model=MODEL_NAME)), on_step))
    found = _simulate(costs, asked, Fleet(*ratio, options.skip_layers, is_shared=True), options.spread)
    return Compared(
        *ratio,
        tuple(load.value for load in asked.loads),
        tuple(Figures.of(level) for level in real.levels),
        tuple(Figures.of(one.level) for one in found.levels),
        real.goodput or 0.0,
        found.goodput,
        tuple(dict.fromkeys(f"{level.load.name}: {text}" for level in real.levels for text in level.warnings)),
    )


def _bench_options(options: argparse.Namespace) -> BenchOptions:
    return BenchOptions(
        endpoint=EndpointOptions("http://127.0.0.1:1"),
        mix=parse_mix(options.mix, Slo(options.slo_ttft_ms, options.slo_tpot_ms)),
        loads=tuple(Load(rate=rate) for rate in sorted(set(options.rates))),
        amount=Amount(options.warm_up, options.num_requests, options.duration_s),
        seed=options.seed,
    )


async def _measure(options: BenchOptions, on_step: Callable[[], None]) -> Benchmark:
    clock = RealClock()
    async with open_endpoint(options.endpoint, clock) as endpoint:
        found = Benchmark(options.settings(endpoint.model))

        def on_level(level: Level) -> None:
            nonlocal found
            found = found.with_level(level)
            on_step()

        await measure_loads(endpoint, options, clock, lambda *_: None, on_level)
        return found


def _simulate(costs: StepCosts, asked: BenchOptions, fleet: Fleet, is_spread: bool) -> Outcome:
    pool = StageConfig(pack_up_to=0) if is_spread else StageConfig()
    plan = PlanOptions(
        costs, ShoalConfig(prefill=pool, decode=pool), (fleet,), asked.mix, asked.loads, asked.amount, asked.seed
    )
    return simulate(fleet, plan)


def show(compared: Sequence[Compared], console: Console) -> None:
    for one in compared:
        table = Table(title=f"{one.num_prefill}P{one.num_decode}D: real / simulated (error)")
        for column in ("requests/s", "TTFT p50 (ms)", "TTFT p90 (ms)", "TPOT p50 (ms)", "both SLOs (%)", "failed"):
            table.add_column(column, justify="right")
        for rate, real, simulated in zip(one.rates, one.real, one.simulated, strict=True):
            points = 100 * (simulated.attained - real.attained)
            table.add_row(
                f"{rate:g}",
                _pair(real.ttft_p50_s, simulated.ttft_p50_s),
                _pair(real.ttft_p90_s, simulated.ttft_p90_s),
                _pair(real.tpot_p50_s, simulated.tpot_p50_s),
                f"{100 * real.attained:.1f} / {100 * simulated.attained:.1f} ({points:+.1f})",
                f"{real.num_failed} / {simulated.num_failed}",
            )
        console.print(table)
        error = relative(one.real_goodput, one.simulated_goodput)
        told = "" if error is None else f" ({error:+.0%})"
        console.print(f"goodput {one.real_goodput:g} / {one.simulated_goodput:g} requests/s{told}")
        for warning in one.warnings:
            console.print(f"warning: {warning}", markup=False, soft_wrap=True)


def relative(real: float | None, simulated: float | None) -> float | None:
    """How much more the simulation says, as a share of what is real."""
    return None if not real or simulated is None else simulated / real - 1


def _pair(real: float | None, simulated: float | None) -> str:
    error = relative(real, simulated)
    if real is None or simulated is None or error is None:
        return "-"
    return f"{1e3 * real:.0f} / {1e3 * simulated:.0f} ({error:+.0%})"


def _result(costs: StepCosts, options: argparse.Namespace, compared: Sequence[Compared]) -> dict[str, Any]:
    settings = {name: value for name, value in vars(options).items() if name not in {"json", "costs"}}
    known = costs.model_dump(mode="json", exclude={"samples"}, exclude_none=True)
    errors = [
        {
            "num_prefill": one.num_prefill,
            "num_decode": one.num_decode,
            "rate": rate,
            **{
                name: relative(getattr(real, name), getattr(simulated, name))
                for name in ("ttft_p50_s", "ttft_p90_s", "tpot_p50_s")
            },
            "attained": simulated.attained - real.attained,
        }
        for one in compared
        for rate, real, simulated in zip(one.rates, one.real, one.simulated, strict=True)
    ]
    return {"settings": settings, "costs": known, "compared": [asdict(one) for one in compared], "errors": errors}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("costs", type=Path, help="what step_costs.py wrote on this machine")
    parser.add_argument("--ratio", type=_ratio, nargs="+", default=[(1, 1), (2, 2)], help="replicas, PREFILL:DECODE")
    parser.add_argument("--spread", action="store_true", help="pack_up_to: 0 in both pools")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0, 2.0, 3.0], help="requests a second")
    parser.add_argument("--mix", default="512:64", help="as for shoal bench")
    parser.add_argument("--slo-ttft-ms", type=float, default=1000.0)
    parser.add_argument("--slo-tpot-ms", type=float, default=100.0)
    parser.add_argument("--skip-layers", type=int, default=10)
    parser.add_argument("--duration-s", type=float, default=60.0, help="of each rate")
    parser.add_argument("--num-requests", type=int, help="or so many of each rate")
    parser.add_argument("--warm-up", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write all figures here")
    return parser.parse_args()


def _ratio(text: str) -> tuple[int, int]:
    prefill, _, decode = text.partition(":")
    return int(prefill), int(decode)


def main() -> None:
    options = _options()
    costs = read_costs(options.costs)
    adopt_orphans()
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    compared: list[Compared] = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for ratio in options.ratio:
            bar = progress.add_task(f"{ratio[0]}P{ratio[1]}D", total=len(set(options.rates)))
            compared.append(compare(costs, options, ratio, lambda bar=bar: progress.advance(bar)))  # type: ignore[misc]
            if options.json:
                text = json.dumps(_result(costs, options, compared), indent=2)
                Path(options.json).write_text(text + "\n", encoding="utf-8")
    show(compared, Console())


if __name__ == "__main__":
    main()
