"""A page to read: a title, and paragraphs, tables and plots in order. One HTML file that needs no other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment


@dataclass(frozen=True, slots=True)
class Heading:
    text: str


@dataclass(frozen=True, slots=True)
class Paragraph:
    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """``rows`` are as wide as ``columns``. The row ``marked`` (from 0) stands out."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    marked: int | None = None


@dataclass(frozen=True, slots=True)
class Plot:
    """``svg`` is trusted (shoal_lab/report/plots.py makes it); every other text of a page is escaped."""

    svg: str
    caption: str = ""


Part = Heading | Paragraph | Table | Plot


def render(title: str, parts: Sequence[Part]) -> str:
    """The page, readable in light and dark; it loads nothing."""
    source = (resources.files("shoal_lab") / "data" / "report.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    kinds = [(type(part).__name__, part) for part in parts]
    return template.render(title=title, parts=kinds)
