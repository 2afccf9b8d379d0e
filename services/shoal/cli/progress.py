"""What is said on stderr while something takes long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

err = Console(stderr=True)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Bars on stderr, one a name; the name '' takes them down."""
    bars = Progress(
        TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=err,
    )  # fmt: skip
    tasks: dict[str, Any] = {}

    def on_progress(name: str, num_done: int, num_total: int) -> None:
        if not name:
            bars.stop()
            return
        if name not in tasks:
            tasks[name] = bars.add_task(name, total=num_total)
        bars.update(tasks[name], completed=num_done, total=num_total)

    tenths: dict[str, int] = {}

    def on_progress_in_lines(name: str, num_done: int, num_total: int) -> None:
        """Where nothing can be redrawn: a line when a thing begins, and one for each tenth of it."""
        tenth = 10 * num_done // max(num_total, 1)
        if name and tenth > tenths.get(name, -1):
            tenths[name] = tenth
            err.print(f"{name}: {num_done} of {num_total}", highlight=False)

    if not err.is_terminal:
        yield on_progress_in_lines
        return
    with bars:
        yield on_progress
