"""An audit says what was looked at: packages that nobody was asked about aren't called sound."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import audit
import pytest

KNOWN = {"name": "fine", "version": "1.0", "vulns": []}
UNKNOWN = {"name": "ours", "skip_reason": "Dependency not found on PyPI and could not be audited: ours (1.0)"}
WEAK = {"name": "weak", "version": "2.0", "vulns": [{"id": "CVE-2026-1", "fix_versions": ["2.1"], "aliases": []}]}


def answer(*packages: Any) -> Any:
    """pip-audit, as it answers."""
    return subprocess.CompletedProcess([], 0, json.dumps({"dependencies": list(packages), "fixes": []}), "")


@pytest.fixture
def pip_audit(monkeypatch: pytest.MonkeyPatch) -> Any:
    def answers(done: Any) -> None:
        monkeypatch.setattr(audit, "program", lambda name: name)
        monkeypatch.setattr(audit, "_run", lambda *arguments: done)

    return answers


def test_a_known_weakness_fails_and_says_where_it_is_repaired(
    pip_audit: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pip_audit(answer(KNOWN, WEAK, UNKNOWN))
    assert audit.main("audit") == 1
    assert "weak 2.0: CVE-2026-1, repaired in 2.1" in (out := capsys.readouterr().out)
    assert "1 known weaknesses in 2 packages; 1 that nobody knows of" in out


def test_nothing_known_passes(pip_audit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pip_audit(answer(KNOWN, UNKNOWN))
    assert audit.main("audit") == 0
    assert "0 known weaknesses in 1 packages; 1 that nobody knows of" in capsys.readouterr().out


@pytest.mark.parametrize(
    "done", [answer(UNKNOWN, UNKNOWN), subprocess.CompletedProcess([], 1, "", "ConnectionError: no route")]
)
def test_where_nobody_can_be_asked_that_is_said(pip_audit: Any, capsys: pytest.CaptureFixture[str], done: Any) -> None:
    pip_audit(done)
    assert audit.main("audit") == 0
    captured = capsys.readouterr()
    assert "known weaknesses" not in captured.out
    assert captured.err.startswith("no audit: ")
