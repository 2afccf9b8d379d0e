"""values.yaml: every value counts, is described by the schema, and says what Shoal's own defaults say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import charts
import pytest
import yaml
from charts import CHART, MONITORING, PRODUCTION

from shoal.config import ShoalConfig

DEFAULTS: Mapping[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
# Where a value can't be just anything.
OTHERS: Mapping[str, Any] = {
    "image.pullPolicy": "Always",
    "image.rayVersion": "2.99.0",
    "model.name": "/models/other",
    "model.mountPath": "/models/llama",
    "gateway.service.type": "NodePort",
    "config": {"log": {"format": "console"}},
    "gcsFaultTolerance.redisAddress": "redis://other:6379",
    "tls.from": "off",
    "tls.issuer.kind": "Issuer",
    "serviceAccount.create": False,
    "monitoring.scrapeConfig.enabled": False,
    "monitoring.prometheusRule.enabled": False,
}


SECRETS = {"gateway": "g", "prefill": "p", "decode": "d"}
# What counts only with another choice than that of EVERYTHING.
CHOICES: Mapping[str, Any] = {
    "tls.from": {"from": "secrets", "secrets": SECRETS},
    **{f"tls.secrets.{role}": {"from": "secrets", "secrets": SECRETS} for role in SECRETS},
}


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def at(tree: Mapping[str, Any], path: str, otherwise: Any = None) -> Any:
    value: Any = tree
    for key in path.split("."):
        if key not in value:
            return otherwise
        value = value[key]
    return value


def with_value(tree: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    key, _, rest = path.partition(".")
    return {**tree, key: with_value(tree.get(key, {}), rest, value) if rest else value}


def other_than(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int():
            return value + 7
        case str() if value[:1].isdigit():  # a quantity
            return "7G"
        case str():
            return "other"
        case list():
            return [{"other": "value"}]
    return {"other": "value"}


EVERYTHING = with_value(PRODUCTION, "monitoring.dashboard.enabled", True)


@pytest.fixture(scope="module")
def everything() -> str:
    return charts.text_of(EVERYTHING, apis=MONITORING)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path, _ in leaves(DEFAULTS)])
def test_a_value_that_changes_changes_what_is_rendered(path: str, everything: str) -> None:
    value = OTHERS.get(path, other_than(at(EVERYTHING, path, at(DEFAULTS, path))))
    chosen, before = EVERYTHING, everything
    if path in CHOICES:
        chosen = with_value(EVERYTHING, path.partition(".")[0], CHOICES[path])
        before = charts.text_of(chosen, apis=MONITORING)
    if path == "tls.from":
        chosen = with_value(chosen, "tls", {})  # secrets would be of no use
    assert charts.text_of(with_value(chosen, path, value), apis=MONITORING) != before


def described(schema: Mapping[str, Any], node: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The paths that a closed schema knows, down to where anything goes."""
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].removeprefix("#/$defs/")]
    if "properties" not in node:
        yield path
        return
    assert node["additionalProperties"] is False, path
    for key, below in node["properties"].items():
        # What is in config, Shoal's own classes say.
        yield from ["config"] if key == "config" else described(schema, below, f"{path}.{key}".lstrip("."))


def test_the_schema_knows_the_values_that_there_are_and_no_others() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    # Helm brings global; autoscaling is there to be refused with a better message.
    known = set(described(schema, schema)) - {"global", "prefill.autoscaling", "decode.autoscaling"}
    # Below some, users put what they like, and defaults do so, too.
    given = {next((name for name in known if f"{path}.".startswith(f"{name}.")), path) for path, _ in leaves(DEFAULTS)}
    assert known == given


@pytest.mark.parametrize(
    "path",
    [
        "model.name",
        *(f"{pool}.{key}" for pool in ("prefill", "decode") for key in ("replicas", "num_cpus", "num_gpus")),
    ],
)
def test_defaults_are_those_of_the_configuration(path: str) -> None:
    assert at(DEFAULTS, path) == at(ShoalConfig().model_dump(), path)


def test_what_is_made_from_other_files_is_up_to_date() -> None:
    command = [sys.executable, str(CHART.parent / "generate.py"), "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stderr
