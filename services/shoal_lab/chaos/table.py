"""The recovery table."""

from __future__ import annotations

from rich import box
from rich.table import Table

from shoal_lab.chaos.load import End
from shoal_lab.chaos.result import Report, Result
from shoal_lab.chaos.scenario import SCENARIOS

# Over each other: with so many, 80 columns are enough.
_COLUMNS = ("requests", "correct", "clear\nerrors", "cut\noff", "wrong", "hung", "felt", "recovered\nafter", "left")

_CAPTION = (
    "cut off: lost the connection to the gateway, or found none; felt: refusals and detours that it caused; left: what "
    "was still held when all should have been free"
)


def render(report: Report) -> Table:
    """A row for each result, and one for all of them."""
    table = Table(
        title=f"chaos: {report.model}", title_justify="left", caption=_CAPTION, caption_justify="left",
        box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False,
    )  # fmt: skip
    table.add_column("scenario", no_wrap=True)
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=name != "left")
    for result in report.results:
        table.add_row(*row(result), style=None if result.is_clean else "red")
    table.add_section()
    sums = (report.num_requests, *(report.num(end) for end in End), report.num_felt)
    table.add_row("all", *map(str, sums), "", "")
    return table


def row(result: Result) -> tuple[str, ...]:
    recovered = "never" if result.recovered_s is None else f"{result.recovered_s:.1f} s"
    left = ", ".join(f"{value:g} {name}" for name, value in result.left.items()) or "0"
    counts = (str(result.num(end)) for end in End)
    return (result.scenario, str(result.num_requests), *counts, str(result.num_felt), recovered, left)


def summary(report: Report) -> str:
    """One line: what it comes to."""
    said = (
        f"{report.num_requests} requests, {100 * report.correct_ratio:.2f} % of those whose connection held answered "
        f"correctly, {report.num(End.WRONG)} wrong, {report.num(End.HUNG)} hung"
    )
    failed = [result.scenario for result in report.results if not result.is_clean]
    return said + (f"; not well: {', '.join(failed)}" if failed else "; nothing was left behind")


def list_scenarios() -> Table:
    """Names, and what happens in each."""
    table = Table("scenario", "what happens")
    for scenario in SCENARIOS:
        table.add_row(scenario.name, scenario.says)
    return table
