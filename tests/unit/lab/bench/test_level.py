"""When a load holds, and which figures come with a warning."""

from __future__ import annotations

import pytest
from bench_records import MIX, answered, failed, level

from shoal_lab.bench.level import measured
from shoal_lab.bench.load import Load
from shoal_lab.bench.mix import Slo, parse_mix
from shoal_lab.bench.record import TokenSource

LOAD = Load(rate=1.0)


@pytest.mark.parametrize(("hits", "misses", "holds"), [(9, 1, True), (89, 11, False), (90, 10, True), (0, 0, False)])
def test_a_load_holds_if_nine_of_ten_requests_meet_both_slos(hits: int, misses: int, holds: bool):
    assert level(1.0, hits, misses).holds is holds


def test_failures_keep_a_load_from_holding():
    records = [*[answered()] * 8, failed(), failed()]
    assert not measured(LOAD, records, 0.1, MIX).holds
    assert measured(LOAD, [*records, *[answered()] * 10], 0.1, MIX).holds


def test_lateness_is_how_long_after_they_were_due_requests_were_sent():
    records = [answered(arrival_s=1.0, sent_s=1.0 + late, is_counted=late > 0.001) for late in (0.001, 0.002, 0.003)]
    found = measured(LOAD, records, 0.1, MIX)
    assert found.lateness_s.p50 == pytest.approx(0.002) and found.lateness_s.num == 3
    closed = measured(Load(concurrency=2), [answered(arrival_s=None)], 0.1, MIX)
    assert closed.lateness_s.num == 0 and not closed.is_late


@pytest.mark.parametrize(
    ("late_s", "cpu_share", "ttft_ms", "is_late"),
    [(0.09, 0.1, 1000, False), (0.11, 0.1, 1000, True), (0.11, 0.1, 2000, False), (0.01, 0.95, 1000, True)],
)
def test_a_generator_that_fell_behind_is_told(late_s: float, cpu_share: float, ttft_ms: float, is_late: bool):
    found = measured(
        LOAD, [answered(sent_s=late_s)] * 200, cpu_share, parse_mix("5:5:1:9000:100,100:11", Slo(ttft_ms, 100))
    )
    assert found.is_late is is_late
    assert any("fell behind" in warning for warning in found.warnings) is is_late


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tokens_from": TokenSource.CHUNKS}, "counted as chunks"),
        ({"output_tokens": 10}, "200 of 200 answers were shorter"),
        ({"prompt_tokens": 111}, "200 of 200 prompts"),
        ({"prompt_tokens": 89}, "200 of 200 prompts"),
    ],
)
def test_what_an_endpoint_did_otherwise_than_asked_is_told(fields: dict[str, object], says: str):
    [warning] = level(1.0, 200, **fields).warnings
    assert says in warning


@pytest.mark.parametrize("fields", [{}, {"prompt_tokens": 109}, {"prompt_tokens": None}])
def test_without_reason_there_is_no_warning(fields: dict[str, object]):
    assert level(1.0, 200, **fields).warnings == ()


def test_few_requests_are_told():
    assert any("p99" in warning for warning in level(1.0, 99).warnings)
