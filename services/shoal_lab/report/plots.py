"""Plots as SVG text: small, the same bytes for the same numbers, readable on light and dark ground."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Text and axes take the colour of the page around them; in a file of its own, that of the reader's scheme.
_INK = "#0a0b0c"
_STYLE = "<style>svg{color:#24292f}@media(prefers-color-scheme:dark){svg{color:#d8dee4}}</style>"
COLORS = ("#d9711c", "#3a86c8", "#3f9b5f", "#a863b5")  # told apart with any colour vision, on white and on black
_STYLES = ("-", "--", ":")  # where there are more lines than colors
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10.0, "text.color": _INK,
    "axes.edgecolor": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "figure.constrained_layout.use": True,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Line:
    """``y`` over ``x``, with a band of ``error`` to each side if there is one."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None


def line_plot(lines: Sequence[Line], *, x_label: str, y_label: str, logarithmic: bool = False) -> str:
    """An SVG element. On a logarithmic axis, points at 0 and below are left out."""
    names = x_label + y_label + "".join(line.label for line in lines)  # they tell this plot from others on a page
    with rc_context({**_SETTINGS, "svg.hashsalt": names}):
        figure = Figure(figsize=(7.2, 3.8))
        axes = figure.add_subplot()
        if logarithmic:
            axes.set_yscale("log")
        for line, (style, color) in zip(lines, itertools.cycle(itertools.product(_STYLES, COLORS)), strict=False):
            _draw(axes, line, color, style, logarithmic=logarithmic)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_axisbelow(True)
        axes.grid(visible=True, axis="y", color=_INK, alpha=0.15, linewidth=0.6)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _embeddable(text.getvalue())


def _draw(axes: Axes, line: Line, color: str, style: str, *, logarithmic: bool) -> None:
    errors = line.error or [0.0] * len(line.y)
    points = [(x, y, e) for x, y, e in zip(line.x, line.y, errors, strict=True) if y > 0 or not logarithmic]
    if not points:
        return
    x, y, error = zip(*points, strict=True)
    axes.plot(x, y, color=color, label=line.label, linestyle=style, marker="o", markersize=3, linewidth=1.6)
    if line.error is not None:
        # A band that reached 0 would have no lower edge on a logarithmic axis: it ends at a tenth of the value.
        low = [max(v - e, v / 10) if logarithmic else v - e for v, e in zip(y, error, strict=True)]
        high = [v + e for v, e in zip(y, error, strict=True)]
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def _embeddable(document: str) -> str:
    """The svg element alone, in the ink of its surroundings."""
    element = document[document.index("<svg") :].replace(_INK, "currentColor")
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    head, _, body = element.partition(">")
    return f"{head}>{_STYLE}{body}"
