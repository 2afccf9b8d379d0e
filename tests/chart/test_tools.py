"""Tools that can't be had are left out, with the reason; nothing fails for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tools
from tools import Missing


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tools, "FOLDER", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


def test_a_source_that_fails_is_a_reason() -> None:
    def fail() -> None:
        raise Missing("the network is down")

    assert tools.fetch({("helm", "kubectl"): fail}) == ["helm, kubectl: the network is down"]


def test_what_is_there_is_not_fetched_again() -> None:
    (tools.FOLDER / "helm").touch()
    fetched: list[str] = []
    reasons = tools.fetch(
        {("helm",): lambda: fetched.append("helm"), ("promtool",): lambda: fetched.append("promtool")}
    )
    assert (fetched, reasons) == (["promtool"], [])


def test_a_test_that_needs_a_missing_tool_is_skipped() -> None:
    with pytest.raises(pytest.skip.Exception, match="helm isn't here: run `make tools`"):
        tools.helm()


def test_a_command_that_is_not_there_is_a_reason() -> None:
    with pytest.raises(Missing, match="apt-get"):
        tools._fetch_debian("promtool")
