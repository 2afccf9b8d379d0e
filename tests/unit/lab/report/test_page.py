"""The page that measurements are read on, and its plots."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from shoal_lab.report.page import Heading, Paragraph, Plot, Table, render
from shoal_lab.report.plots import Line, line_plot

LINES = [Line("one", [0, 1, 2], [3.0, 1.0, 0.0], [0.1, 0.2, 0.0]), Line("<two>", [0, 1, 2], [1.0, 2.0, 4.0])]


def svg(*, logarithmic: bool = False) -> str:
    return line_plot(LINES, x_label="layer", y_label="nats & more", logarithmic=logarithmic)


def test_everything_that_is_not_a_plot_is_escaped():
    page = render(
        "<title>", [Heading("a<b"), Paragraph("c&d"), Table(["<e>"], [["<f>"]], "<g>"), Plot("<svg/>", "<h>")]
    )
    for written in ("&lt;title&gt;", "a&lt;b", "c&amp;d", "&lt;e&gt;", "&lt;f&gt;", "&lt;g&gt;", "<svg/>", "&lt;h&gt;"):
        assert written in page
    assert "<f>" not in page and "<h>" not in page


def test_a_page_loads_nothing_and_knows_light_and_dark():
    page = render("Title", [Plot(svg()), Table(["a", "b"], [["1", "2"], ["3", "4"]], marked=1)])
    assert re.findall(r'(?:src|href)="(?!#)', page) == [] and "url(http" not in page and "@import" not in page
    assert "default-src 'none'" in page and "prefers-color-scheme" in page
    assert page.count('class="marked"') == 1


def test_a_plot_is_well_formed_and_the_same_for_the_same_numbers():
    first = svg()
    assert first == svg()
    root = ET.fromstring(first)
    assert root.tag.endswith("svg") and root.get("viewBox")
    words = "".join(root.itertext())
    assert "layer" in words and "nats & more" in words and "<two>" in words


def test_no_line_is_left_out_however_many_there_are():
    many = line_plot([Line(f"line {n}", [0, 1], [n, n + 1.0]) for n in range(9)], x_label="x", y_label="y")
    words = "".join(ET.fromstring(many).itertext())
    assert all(f"line {n}" in words for n in range(9))
    drawn = re.findall(r'style="(fill: none; [^"]*stroke: #[^"]*)"', many)
    assert len(set(drawn)) >= 9  # those of one color are told apart by their dashes


def test_a_logarithmic_axis_leaves_zeros_out():
    assert svg() != svg(logarithmic=True)
    nothing = line_plot([Line("none", [0, 1], [0.0, 0.0])], x_label="x", y_label="y", logarithmic=True)
    ET.fromstring(nothing)
