"""A comparison for the terminal: speeds as ratios."""

from __future__ import annotations

from collections.abc import Iterator

from comparison import Comparison, Metric
from load import LoadOptions
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

_BUSY = 0.1


def show(comparison: Comparison, load: LoadOptions, console: Console) -> None:
    console.print(Group(*_parts(comparison, load)))


def _parts(comparison: Comparison, load: LoadOptions) -> Iterator[RenderableType]:
    yield _speeds(comparison, load)
    yield from _failures(comparison)
    busy = max(comparison.busy.values(), default=0.0)
    if busy > _BUSY:
        yield (
            f"[yellow]warning: others used up to {busy:.0%} of the cores as a round began: "
            "these timings are worth little[/]"
        )


def _speeds(comparison: Comparison, load: LoadOptions) -> Table:
    table = Table(
        title=f"a prompt of {load.prompt_tokens} tokens alone; "
        f"streams of {load.stream_prompt_tokens} + {load.stream_output_tokens} tokens",
        caption=f"in brackets: how many times as fast as {comparison.baseline}, the median of ratios within a round",
    )
    table.add_column("arm", no_wrap=True)
    table.add_column("cores", no_wrap=True)
    for metric in comparison.metrics:
        table.add_column(f"{metric.name}\n{'ms' if metric.is_time else 'tok/s'}", justify="right", no_wrap=True)
    for name, measured in comparison.measured.items():
        if measured.rounds:
            cells = (_cell(comparison, name, metric) for metric in comparison.metrics)
            table.add_row(name, measured.mode, *cells)
    return table


def _cell(comparison: Comparison, name: str, metric: Metric) -> str:
    median, speed = comparison.measured[name].median(metric), comparison.speed(name, metric)
    if median is None:
        return ""
    value = f"{1e3 * median:.1f}" if metric.is_time else f"{median:.1f}"
    return value if speed is None else f"{value}\n({speed:.2f})"


def _failures(comparison: Comparison) -> Iterator[Table]:
    failed = [measured for measured in comparison.measured.values() if measured.failure is not None]
    if failed:
        table = Table("arm", "why it isn't measured, or not in every round", title="missing")
        for measured in failed:
            what = "skipped" if measured.arm.missing else "failed"
            table.add_row(measured.arm.name, escape(f"{what}: {measured.failure}"))
        yield table
