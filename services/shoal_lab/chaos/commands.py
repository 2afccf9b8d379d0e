"""``shoal chaos``, from what was typed to what is printed."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from shoal.errors import ConfigError
from shoal.telemetry import configure_logging
from shoal_lab.chaos.play import Limits, Progress
from shoal_lab.chaos.result import Report, Result
from shoal_lab.chaos.run import ChaosOptions, run
from shoal_lab.chaos.scenario import choose
from shoal_lab.chaos.table import render, summary


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
    tls: bool,
) -> bool:
    """Print the table; whether nothing was wrong, hung or left behind. Raises ShoalError."""
    configure_logging("warning", "console", error_text=True)  # of prompts of one's own
    options = ChaosOptions(
        model, choose(scenario), Limits(num_requests, num_in_flight), minutes, seed=seed, show_logs=show_logs, tls=tls
    )
    results: list[Result] = []

    def on_result(result: Result) -> None:
        on_progress(result.scenario, result.num_requests, result.num_requests)
        results.append(result)
        _write(output, Report(model, tuple(results)))

    _write(output, Report(model, ()))
    try:
        report = run(options, on_progress, on_result)
    except KeyboardInterrupt:
        if results:
            _show(Report(model, tuple(results)))
        raise
    on_progress("", 0, 0)
    _show(report)
    return report.is_clean


def _show(report: Report) -> None:
    console = Console()
    console.print(render(report))
    console.print(summary(report))


def _write(path: Path | None, report: Report) -> None:
    """First of all, and after each scenario: a run that is stopped leaves what it has."""
    try:
        if path is not None:
            path.write_text(report.to_json(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} can't be written ({error.strerror}): choose another --json") from error
