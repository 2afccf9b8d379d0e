"""The page has every figure, says what goes for them, and draws them."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import bench_records
import pytest
from bench_records import answered, failed, level

from shoal_lab.bench.benchmark import Benchmark, BenchOptions
from shoal_lab.bench.benchmark_page import latency_plot, render_benchmark, share_plot, summarize_benchmark
from shoal_lab.bench.endpoint import EndpointOptions
from shoal_lab.bench.level import measured
from shoal_lab.bench.load import Load
from shoal_lab.bench.mix import Slo, parse_mix
from shoal_lab.bench.record import Failure

MIX = parse_mix("100:11:1:800:90,7:2:3", Slo(1000, 100))
RECORDS = [
    *(answered(ttft_s=index / 100, e2e_s=0.5 + index / 100) for index in range(1, 101)),
    *[answered(kind="7:2", max_tokens=2, output_tokens=2, ttft_s=0.01, e2e_s=0.02)] * 98,
    failed(Failure.REJECTED, kind="7:2", status=429, detail="<too> busy"),
    failed(Failure.TIMEOUT, kind="7:2", detail="not done after 9 s"),
]
OPTIONS = BenchOptions(EndpointOptions("http://127.0.0.1:1"), MIX)
FOUND = (
    Benchmark(OPTIONS.settings("m<1>"))
    .with_level(measured(Load(rate=4.0), RECORDS, 0.1, MIX))
    .with_level(measured(Load(rate=2.0), RECORDS[:80] + RECORDS[100:180], 0.1, MIX))
)


@pytest.fixture(scope="module")
def page() -> str:
    return render_benchmark(FOUND)


def cells(page: str) -> list[list[str]]:
    return [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr.*?>(.*?)</tr>", page)]


def test_the_page_has_a_row_for_every_load_and_class(page: str):
    rows = cells(page)
    assert ["4", "200", "2", "89.0 [83.9, 92.6]", "89.0", "99.0"] in rows
    ttft = FOUND.levels[0].overall.ttft_s
    figures = [f"{1e3 * value:.1f}" for value in (ttft.mean, ttft.p50, ttft.p90, ttft.p99, ttft.max)]
    assert ["4", "198", *figures] in rows
    # 1 to 100 hundredths of a second
    assert ["4", "100", "0", "80.0", "505.0", "901.0", "990.1", "50.0", "50.0", "50.0"] in rows
    assert ["4", "100", "2", "98.0", "10.0", "10.0", "10.0", "10.0", "10.0", "10.0"] in rows
    assert ["4", "1", "1"] in rows and ["2", "0", "0"] in rows
    assert ["25 % of requests", "100:11 (prompt:output tokens), TTFT 800 ms, TPOT 90 ms"] in rows


def test_loads_are_in_order_and_goodput_is_marked(page: str):
    assert "Goodput: 2 requests/s." in page
    [marked] = re.findall(r'<tr class="marked"><td>(.*?)</td>', page)
    assert marked == "2"
    assert page.index("<td>2</td>") < page.index("<td>4</td>")


def test_failures_are_told_once_and_escaped(page: str):
    assert page.count("The first rejected: HTTP 429: &lt;too&gt; busy") == 1
    assert page.count("The first timeout: not done after 9 s") == 1 and "m<1>" not in page


def test_the_curves_are_in_the_page(page: str):
    plots = [share_plot(FOUND), latency_plot(FOUND, lambda summary: summary.ttft_s, "TTFT")]
    for plot in plots:
        ET.fromstring(plot)
        assert plot in page
    assert page.count("<svg") == 5
    assert "goodput needs" in plots[0] and "requests/s" in plots[0]


def test_warnings_name_their_loads():
    settings = replace(OPTIONS, mix=bench_records.MIX).settings("m")
    few = Benchmark(settings).with_level(level(1.0, 5)).with_level(level(2.0, 5))
    assert "Beware (1 requests/s, 2 requests/s): 5 requests counted" in render_benchmark(few)


def test_a_load_without_any_answer_still_has_a_page():
    none = Benchmark(OPTIONS.settings("m")).with_level(measured(Load(concurrency=2), [failed()], 0.1, MIX))
    page = render_benchmark(none)
    assert ">requests at a time</th>" in page and "Goodput:" not in page
    assert "TTFT -/-/-" in summarize_benchmark(none)[0]
