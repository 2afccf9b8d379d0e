"""How many replicas of each pool, and how many layers to skip: simulated from what steps cost on a machine."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from shoal.cli.progress import err, progress_bars
from shoal.errors import ShoalError


class RoutingOption(StrEnum):
    TWO_CHOICES = "two-choices"
    SHORTEST = "shortest"


def simulate(
    costs: Annotated[
        Path,
        typer.Argument(
            help="What steps cost: a JSON file that tests/benchmarks/step_costs.py measures.", metavar="COSTS.json"
        ),
    ],
    replicas: Annotated[
        int | None, typer.Option(min=2, max=1024, help="So many in all: every ratio of prefill to decode is tried.")
    ] = None,
    ratio: Annotated[
        str | None,
        typer.Option(help="Or these ratios. 0:1 is one decode replica that does all.", metavar="PREFILL:DECODE,..."),
    ] = None,
    skip_layers: Annotated[
        str | None, typer.Option(help="Numbers of skipped layers. Default: all that the costs know.", metavar="0,10")
    ] = None,
    rate: Annotated[
        str,
        typer.Option(
            help="Requests a second that arrive at random. sweep looks for the goodput, from half of what the costs "
            "would allow without queues.",
            metavar="2,4,8|sweep",
        ),
    ] = "sweep",
    duration_s: Annotated[
        float | None,
        typer.Option(min=0.1, help="How long requests that count arrive, at each load. Default: 30. Longer is surer."),
    ] = None,
    num_requests: Annotated[int | None, typer.Option(min=1, help="Or how many, at each load.")] = None,
    warm_up: Annotated[int, typer.Option(min=0, help="The first requests of each load, which don't count.")] = 8,
    mix: Annotated[
        str,
        typer.Option(help="Classes of requests, as for shoal bench.", metavar="PROMPT:OUTPUT[:SHARE[:TTFT:TPOT]],..."),
    ] = "512:64",
    slo_ttft_ms: Annotated[float, typer.Option(help="Of classes that name none in --mix.")] = 1000.0,
    slo_tpot_ms: Annotated[float, typer.Option(help="Of classes that name none in --mix.")] = 100.0,
    config: Annotated[
        Path | None, typer.Option(help="Limits of the pools, as shoal serve takes them (docs/configuration.md).")
    ] = None,
    routing: Annotated[
        RoutingOption,
        typer.Option(
            help="two-choices: as Shoal's router does, the idler of two random replicas; with --shared the busiest "
            "that has room. shortest: the idlest of all."
        ),
    ] = RoutingOption.TWO_CHOICES,
    shared: Annotated[
        bool, typer.Option("--shared", help="All replicas share one machine's cores; else each has its own machine.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same figures, digit by digit.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("simulation"),
) -> None:
    """How many prefill and decode replicas, and how many layers to skip? Simulated, from what steps cost.

    No model is loaded: Shoal's own scheduler runs, and time passes as the costs say. The requests are those that shoal
    bench would send by the same --mix and --seed, so that both can be compared.

    First: python tests/benchmarks/step_costs.py --json step-costs.json. Then: simulate.py step-costs.json
    --replicas 8. Writes simulation.json and report.html: percentiles of TTFT and TPOT, goodput (the highest rate at
    which at least 90 % of requests meet both SLOs), how busy the pools are, and the best of all ratios: of those whose
    goodput is within an eighth of the highest, which is as near as it is known, the one that skips the fewest layers,
    then the one of the fewest replicas.
    """
    from simulation.commands import run_simulate

    try:
        with progress_bars() as on_progress:
            said = run_simulate(
                costs, on_progress, config=config, replicas=replicas, ratio=ratio, skip_layers=skip_layers, rate=rate,
                duration_s=duration_s, num_requests=num_requests, warm_up=warm_up, mix=mix, slo_ttft_ms=slo_ttft_ms,
                slo_tpot_ms=slo_tpot_ms, routing=str(routing), shared=shared, seed=seed, output=output,
            )  # fmt: skip
    except KeyboardInterrupt:
        err.print("stopped: nothing was written")
        raise typer.Exit(130) from None
    print(said)


if __name__ == "__main__":
    try:
        typer.run(simulate)
    except ShoalError as error:
        err.print(f"[red]error:[/red] {escape(error.message)}", soft_wrap=True)
        sys.exit(2)
