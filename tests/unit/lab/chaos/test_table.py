from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from shoal.errors import ConfigError, PeerGone
from shoal_lab.chaos.load import End, Outcome
from shoal_lab.chaos.result import Report, Result
from shoal_lab.chaos.scenario import ALL, SCENARIOS, choose
from shoal_lab.chaos.table import render, summary


def outcomes(**numbers: int) -> list[Outcome]:
    return [
        Outcome("a", End(end), 0, 1, PeerGone("it went away") if end == "error" else None)
        for end, number in numbers.items()
        for _ in range(number)
    ]


GOOD = Result.of(
    "kill-decode", "it dies", outcomes(correct=97, error=1, cut_off=2),
    num_in_flight=40, repairs={"retries peer_gone": 3}, recovered_s=1.26, left={}, duration_s=9.0,
)  # fmt: skip


def text_of(report: Report, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render(report))
    console.print(summary(report), soft_wrap=True)
    written: str = console.file.getvalue()  # type: ignore[attr-defined]
    return written


def test_a_row_tells_all_and_the_last_one_adds_up():
    report = Report("tiny", (GOOD, GOOD))
    rows = [line.split() for line in text_of(report).replace("│", " ").splitlines()]
    assert ["kill-decode", "100", "97", "1", "2", "0", "0", "3", "1.3", "s", "0"] in rows
    assert ["all", "200", "194", "2", "4", "0", "0", "6"] in rows
    # Whose connection broke isn't counted against the pools.
    assert "98.98 %" in summary(report) and "nothing was left behind" in summary(report)
    assert report.is_clean


@pytest.mark.parametrize(
    "bad",
    [
        replace(GOOD, num_by_end={"correct": 99, "wrong": 1}),
        replace(GOOD, num_by_end={"correct": 99, "hung": 1}),
        replace(GOOD, left={"reserved blocks": 2.0}),
        replace(GOOD, recovered_s=None),
    ],
)
def test_whatever_is_wrong_hung_left_or_lost_is_not_clean_and_is_named(bad: Result):
    report = Report("tiny", (GOOD, bad))
    assert not report.is_clean
    assert "not well: kill-decode" in summary(report)


def test_a_run_that_has_shown_nothing_is_not_clean():
    assert json.loads(Report("tiny", ()).to_json())["is_clean"] is False


def test_scenarios_are_chosen_by_name_and_each_is_there_once():
    assert choose(ALL) == SCENARIOS
    assert [scenario.name for scenario in choose("partition, kill-decode,partition")] == ["partition", "kill-decode"]
    assert len({scenario.name for scenario in SCENARIOS}) == len(SCENARIOS)
    with pytest.raises(ConfigError, match="there is no scenario 'flood': there are kill-prefill"):
        choose("flood")
