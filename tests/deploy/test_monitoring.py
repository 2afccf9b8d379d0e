"""Prometheus' configuration and alerts, and Grafana's dashboard: they ask for what there is."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tools
import yaml
from promql import faults_of, labels_left, parse

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
DASHBOARD = json.loads((DEPLOY / "grafana/shoal.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES = [rule for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
QUERIES = [
    pytest.param(target, id=f"{panel['title']} {target['refId']}") for panel in PANELS for target in panel["targets"]
]


def named(rule: dict[str, Any]) -> str:
    return str(rule["alert"])


def promtool(*arguments: str) -> str:
    """What promtool says; fails the test where it isn't satisfied."""
    done = subprocess.run(
        [tools.promtool(), *arguments], cwd=PROMETHEUS, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- Prometheus -----------------------------------------------------------------------------------------


def test_promtool_accepts_the_configuration_and_its_rules() -> None:
    assert f"{len(RULES)} rules found" in promtool("check", "config", "prometheus.yml")


def test_alerts_fire_when_they_should_and_only_then() -> None:
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yml")


def test_every_alert_is_seen_to_fire() -> None:
    fired = set(re.findall(r'alertname="(\w+)"', (PROMETHEUS / "alerts_test.yml").read_text()))
    assert fired == {rule["alert"] for rule in RULES}


def test_the_page_for_operators_lists_every_alert() -> None:
    page = (DEPLOY.parent / "docs" / "operate.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (\w+) \| (page|warning) \|", page, re.MULTILINE)
    assert sorted(listed) == sorted((rule["alert"], rule["labels"]["severity"]) for rule in RULES)


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_alerts_ask_for_metrics_and_labels_that_exist(rule: dict[str, Any]) -> None:
    assert faults_of(rule["expr"]) == []


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_alerts_name_only_labels_that_their_expression_leaves(rule: dict[str, Any]) -> None:
    text = " ".join(rule["annotations"].values())
    assert set(re.findall(r"\$labels\.(\w+)", text)) <= labels_left(parse(rule["expr"]))


# --- Grafana --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", QUERIES)
def test_queries_ask_for_metrics_and_labels_that_exist(target: dict[str, Any]) -> None:
    assert faults_of(target["expr"]) == []
