"""What survives which fault: the command of shoal_lab.chaos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.progress import err, progress_bars


def chaos(
    scenario: Annotated[
        str, typer.Option(help="Some, with commas between them, or all. --list names them.", metavar="NAME,…|all")
    ] = "all",
    minutes: Annotated[
        float, typer.Option(min=0.0, help="Begin again with the first scenario until so many have passed.")
    ] = 0.0,
    model: Annotated[
        str, typer.Option(help="As for serve; a small one is as good.", metavar="NAME|DIR|FILE.gguf")
    ] = "smollm2",
    requests: Annotated[int, typer.Option(min=1, help="At least so many in each scenario.")] = 64,
    in_flight: Annotated[int, typer.Option(min=1, help="So many of them at any time, also when the fault comes.")] = 40,
    tls: Annotated[bool, typer.Option("--tls", help="Let the processes speak mutual TLS, as in production.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="The same seed asks the same.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write all figures here, too.", metavar="FILE")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Say what scenarios there are, and end.")] = False,
    show_logs: Annotated[bool, typer.Option("--show-logs", help="Also print the replicas' logs.")] = False,
) -> None:
    """Break a cluster of your own on purpose, under load, and see how it recovers.

    Two prefill and two decode replicas are started on this host, with a proxy between the pools. In each scenario
    something happens to them while requests are under way (kill -9, a partition, flipped bits, a full pool, …), and
    each answer is compared with what this process computes by itself before. Ends with a table; exits 1 if an answer
    was wrong, a request hung, memory stayed held, or not all came back. Nothing else on this machine is touched.

    Try: shoal chaos --scenario kill-decode,partition. All of them take about twenty minutes on two cores.
    """
    from rich.console import Console

    from shoal_lab.chaos.commands import run_chaos
    from shoal_lab.chaos.table import list_scenarios

    if list_:
        Console().print(list_scenarios())
        return
    try:
        with progress_bars() as on_progress:
            is_clean = run_chaos(
                on_progress, model=model, scenario=scenario, minutes=minutes, num_requests=requests,
                num_in_flight=in_flight, seed=seed, output=json, show_logs=show_logs, tls=tls,
            )  # fmt: skip
    except KeyboardInterrupt:
        err.print("stopped")
        raise typer.Exit(130) from None
    if not is_clean:
        raise typer.Exit(1)
