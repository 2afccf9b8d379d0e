"""``shoal chaos``, from what was typed to what is printed."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from shoal.chaos.play import Limits, Progress
from shoal.chaos.result import Result
from shoal.chaos.run import ChaosOptions, run
from shoal.chaos.scenario import choose
from shoal.chaos.table import render, summary
from shoal.errors import ConfigError
from shoal.telemetry import configure_logging


def run_chaos(
    on_progress: Progress,
    *,
    model: str,
    scenario: str,
    minutes: float,
    num_requests: int,
    num_in_flight: int,
    seed: int,
    output: Path | None,
    show_logs: bool,
) -> bool:
    """Print the table; whether nothing was wrong, hung or left behind. Raises ShoalError."""
    configure_logging("warning", "console")
    options = ChaosOptions(
        model, choose(scenario), Limits(num_requests, num_in_flight), minutes, seed=seed, show_logs=show_logs
    )
    if output is not None:
        _try_to_write(output)

    def on_result(result: Result) -> None:
        on_progress(result.scenario, result.num_requests, result.num_requests)

    report = run(options, on_progress, on_result)
    on_progress("", 0, 0)
    if output is not None:
        output.write_text(report.to_json(), encoding="utf-8")
    console = Console()
    console.print(render(report))
    console.print(summary(report))
    return report.is_clean


def _try_to_write(path: Path) -> None:
    """Before the run, not after it."""
    try:
        path.touch()
    except OSError as error:
        raise ConfigError(f"{path} can't be written ({error.strerror}): choose another --json") from error
