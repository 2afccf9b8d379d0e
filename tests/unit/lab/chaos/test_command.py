"""``shoal chaos`` as people meet it, all but the cluster."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shoal.cli import app
from shoal.errors import ConfigError
from shoal_lab.chaos import commands
from shoal_lab.chaos.load import End, Outcome
from shoal_lab.chaos.result import Report, Result
from shoal_lab.chaos.run import ChaosOptions
from shoal_lab.chaos.scenario import SCENARIOS

GOOD = Result.of(
    "reset", "all is reset", [Outcome("a", End.CORRECT, 0, 1)],
    num_in_flight=40, repairs={}, recovered_s=1.0, left={}, duration_s=2.0,
)  # fmt: skip


def chaos(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["chaos", *arguments])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[ChaosOptions]:
    """What a run that ends well was asked; one with the model ``bad`` ends otherwise, and ``stop`` is stopped."""
    found: list[ChaosOptions] = []

    def run(options: ChaosOptions, _progress: Any, on_result: Callable[[Result], None]) -> Report:
        found.append(options)
        result = GOOD if options.model != "bad" else replace(GOOD, left={"reserved blocks": 1.0})
        on_result(result)
        if options.model == "stop":
            raise KeyboardInterrupt
        return Report(options.model, (result,))

    monkeypatch.setattr(commands, "run", run)
    return found


def test_a_good_run_prints_its_table_and_writes_its_figures(asked: list[ChaosOptions], tmp_path: Path):
    path = tmp_path / "chaos.json"
    said = chaos(
        "--scenario", "reset,drop", "--minutes", "2", "--requests", "9", "--in-flight", "8", "--json", str(path)
    )
    assert said.exit_code == 0, said.output
    assert "nothing was left behind" in said.stdout.replace("\n", " ")
    [options] = asked
    assert [scenario.name for scenario in options.scenarios] == ["reset", "drop"]
    assert (options.minutes, options.limits.num_requests, options.limits.num_in_flight) == (2, 9, 8)
    assert json.loads(path.read_text())["results"][0]["scenario"] == "reset"


def test_it_fails_if_anything_was_not_well(asked: list[ChaosOptions]):
    said = chaos("--model", "bad")
    assert said.exit_code == 1
    assert "not well: reset" in said.stdout.replace("\n", " ")
    assert asked[0].scenarios == SCENARIOS


def test_a_run_that_is_stopped_leaves_what_it_has(asked: list[ChaosOptions], tmp_path: Path):
    path = tmp_path / "chaos.json"
    stopped = chaos("--model", "stop", "--json", str(path))
    assert stopped.exit_code == 130 and "reset" in stopped.stdout  # the table of what was played
    assert len(json.loads(path.read_text())["results"]) == len(asked) == 1


def test_what_cannot_be_is_said_before_anything_starts(asked: list[ChaosOptions], tmp_path: Path):
    unknown, unwritable = chaos("--scenario", "flood"), chaos("--json", str(tmp_path / "no" / "chaos.json"))
    for said, message in ((unknown, "no scenario 'flood'"), (unwritable, "choose another --json")):
        assert isinstance(said.exception, ConfigError) and message in said.exception.message
    assert asked == []
