"""Percentiles, shares and windows, on records whose figures are known."""

from __future__ import annotations

import pytest
from bench_records import MIX, answered, failed

from shoal_lab.bench.mix import Slo
from shoal_lab.bench.record import Failure, Record
from shoal_lab.bench.summary import percentiles, share, summarize

SLOS = {MIX[0].name: MIX[0].slo}


def test_percentiles_interpolate_between_values():
    found = percentiles([*range(1, 102), None])
    assert (found.num, found.mean, found.p50, found.p90, found.p99, found.max) == (101, 51, 51, 91, 100, 101)
    assert percentiles([1.0, 2.0]).p90 == pytest.approx(1.9)
    assert percentiles([None]).p50 is None and percentiles([]).num == 0


@pytest.mark.parametrize(
    ("record", "meets"),
    [
        (answered(ttft_s=1.0, e2e_s=2.0), (True, True)),
        (answered(ttft_s=1.000001, e2e_s=1.5), (False, True)),
        (answered(ttft_s=0.5, e2e_s=1.500011), (True, False)),
        (answered(ttft_s=0.5, e2e_s=0.5, output_tokens=1), (True, True)),
        (failed(), (False, False)),
    ],
)
def test_an_slo_is_met_up_to_its_very_value(record, meets):
    slo = Slo(1000, 100)
    assert (record.meets_ttft(slo), record.meets_tpot(slo)) == meets


def test_the_share_is_of_requests_that_met_both_and_failures_met_none():
    records = [
        *[answered()] * 5,
        answered(ttft_s=1.5, e2e_s=2.0),
        answered(ttft_s=0.5, e2e_s=2.5),
        answered(ttft_s=1.5, e2e_s=4.5),
        failed(Failure.REJECTED),
        failed(Failure.TIMEOUT),
        *[failed(is_counted=False)] * 50,
    ]
    [found] = summarize(records, SLOS)
    assert (found.kind, found.num_requests, found.num_failed) == ("all", 10, 2)
    assert found.failures == {Failure.REJECTED: 1, Failure.TIMEOUT: 1}
    shares = (found.attained, found.attained_ttft, found.attained_tpot)
    assert [(one.num, one.value) for one in shares] == [(10, 0.5), (10, 0.6), (10, 0.6)]


def test_latencies_are_of_requests_answered_in_full():
    records = [answered(ttft_s=0.1, e2e_s=1.1, itl_s=(0.1,)), answered(ttft_s=0.3, itl_s=(0.2, 0.6)), failed(ttft_s=9)]
    [found] = summarize(records, SLOS)
    assert (found.ttft_s.num, found.ttft_s.p50, found.ttft_s.max) == (2, pytest.approx(0.2), 0.3)
    assert (found.itl_s.num, found.itl_s.p50) == (3, pytest.approx(0.2))
    assert found.tpot_s.p50 == pytest.approx((0.1 + 0.07) / 2)
    assert found.e2e_s.p50 == pytest.approx(1.05)


def test_throughput_is_what_was_answered_in_the_window_of_those_that_count():
    records = [
        answered(sent_s=0.0, e2e_s=50.0, is_counted=False),
        answered(sent_s=1.0, e2e_s=4.0),
        failed(sent_s=2.0),
        answered(sent_s=4.0, e2e_s=2.0, prompt_tokens=None),
    ]
    [found] = summarize(records, SLOS)
    assert found.window_s == 5.0
    assert (found.requests_per_s, found.output_tokens_per_s) == (2 / 5, 22 / 5)
    assert (found.prompt_tokens, found.output_tokens) == (100, 11)


def closed_loop(num_rounds: int, kinds: tuple[str, ...] = (MIX[0].name,) * 4) -> list[Record]:
    """A client a kind, one after the other at first; each answer takes a second, and the first of each warms up."""
    return [
        answered(kind=kind, arrival_s=None, sent_s=client / len(kinds) + number, is_counted=number > 0)
        for number in range(1 + num_rounds)
        for client, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize("num_rounds", [1, 3, 20])
def test_a_closed_loop_s_throughput_is_of_the_time_in_which_all_of_its_clients_are_busy(num_rounds: int):
    """What warmed up is served beside what counts, and at the end, clients run out: four a second all the same."""
    [found] = summarize(closed_loop(num_rounds), SLOS)
    assert (found.num_requests, found.window_s) == (4 * num_rounds, num_rounds - 0.25)
    assert (found.requests_per_s, found.output_tokens_per_s) == (4, 44)


def test_a_closed_loop_that_ends_before_it_is_busy_has_the_window_of_its_answers():
    warm, counted = answered(arrival_s=None, is_counted=False), answered(arrival_s=None, sent_s=1.0, e2e_s=2.0)
    [found] = summarize([warm, counted], SLOS)
    assert (found.window_s, found.requests_per_s) == (2, 1 / 2)


def test_each_class_is_judged_by_its_own_slos():
    slos = {"short": Slo(100, 100), "long": Slo(1000, 100)}
    found = summarize([answered(kind="short"), answered(kind="long"), answered(kind="long", ttft_s=2.0)], slos)
    assert [(one.kind, one.num_requests, one.attained.value) for one in found] == [
        ("all", 3, pytest.approx(1 / 3)), ("short", 1, 0), ("long", 2, 0.5),
    ]  # fmt: skip


def test_nothing_counted_is_no_division_by_zero():
    [found] = summarize([answered(is_counted=False)], SLOS)
    assert (found.num_requests, found.window_s, found.requests_per_s, found.attained.value) == (0, 0, 0, 0)


def test_intervals_are_wilsons():
    # Newcombe (1998), Statistics in Medicine 17, table I: 81/263, 15/148, 0/20, 1/29.
    for hits, num, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611),
                                 (1, 29, 0.0061, 0.1718)):  # fmt: skip
        found = share(hits, num)
        assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert share(20, 20).high == 1
