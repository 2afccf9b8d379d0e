"""Prometheus' configuration and alerts, and Grafana's dashboard: they ask for what there is."""

from __future__ import annotations

import json
import re
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import tools
import yaml
from metric_names import TARGET_LABELS
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
def test_alerts_say_how_urgent_they_are_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"].keys() == {"severity"} and rule["labels"]["severity"] in {"page", "warning"}
    assert rule["annotations"].keys() == {"summary", "description"}


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_alerts_name_only_labels_that_their_expression_leaves(rule: dict[str, Any]) -> None:
    text = " ".join(rule["annotations"].values())
    assert set(re.findall(r"\$labels\.(\w+)", text)) <= labels_left(parse(rule["expr"]))


# --- Grafana --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", QUERIES)
def test_queries_ask_for_metrics_and_labels_that_exist(target: dict[str, Any]) -> None:
    assert faults_of(target["expr"]) == []


@pytest.mark.parametrize("target", QUERIES)
def test_legends_name_the_labels_that_tell_the_lines_apart(target: dict[str, Any]) -> None:
    in_legend = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
    left = labels_left(parse(target["expr"]))
    assert left - TARGET_LABELS <= in_legend <= left
    # A line for each process says which one it is.
    assert in_legend & {"role", "replica"} or not left & TARGET_LABELS


def test_the_datasource_is_the_readers_choice() -> None:
    [variable] = DASHBOARD["templating"]["list"]
    assert (variable["type"], variable["query"]) == ("datasource", "prometheus")
    used = [panel["datasource"] for panel in PANELS]
    used += [target["datasource"] for panel in PANELS for target in panel["targets"]]
    assert all(source == {"type": "prometheus", "uid": f"${{{variable['name']}}}"} for source in used)


def test_panels_have_a_unit_and_say_what_they_show() -> None:
    assert [panel["title"] for panel in PANELS if not panel["fieldConfig"]["defaults"]["unit"]] == []
    assert [panel["title"] for panel in PANELS if not panel["description"].endswith(".")] == []


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert [one["title"] for one, other in combinations(panels, 2) if _overlap(one["gridPos"], other["gridPos"])] == []
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)


def _overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    return all(
        one[start] < other[start] + other[length] and other[start] < one[start] + one[length]
        for start, length in (("x", "w"), ("y", "h"))
    )


def test_what_does_not_exist_is_noticed() -> None:
    assert faults_of('sum by (lost) (rate(shoal_preemptions_total{x="y"}[5m]))') == [
        'sum by (lost): rate(shoal_preemptions_total{x="y"}[5m]) has no such label',
        "shoal_preemptions_total has no label x",
    ]
    assert faults_of('shoal_kv_fallback_total{rung="locl"} / on (none) shoal_nothing')[1:] == [
        "no rung is locl",
        "there is no metric shoal_nothing",
    ]
    with pytest.raises(ValueError, match="parenthesis"):
        parse("sum(rate(shoal_preemptions_total[5m])")
