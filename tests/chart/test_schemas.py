"""What the chart renders is what Kubernetes, KubeRay and the Prometheus operator take."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import charts
import jsonschema
import kubernetes_validate
import pytest
import tools
import yaml
from charts import MONITORING, PRODUCTION, Object

# Kubernetes' newest version that the checker knows, and the oldest that Chart.yaml admits.
VERSIONS = ("1.37", "1.30")
CORE = ("v1", "policy/v1", "networking.k8s.io/v1")
# A folder with schemas of custom resources, derived from public ones. They are no part of this repository.
CRDS_VARIABLE = "SHOAL_CRDS"
CRDS = Path(os.environ.get(CRDS_VARIABLE, Path(__file__).parents[3] / "shared" / "crds"))
OTHERS = {
    "RayService": "rayservice-ray.io-v1",
    "PrometheusRule": "prometheusrule-monitoring.coreos.com-v1",
    "ScrapeConfig": "scrapeconfig-monitoring.coreos.com-v1alpha1",
}
VALUES: Mapping[str, Mapping[str, Any]] = {"defaults": {}, "production": PRODUCTION}

with_values = pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)


def core_objects(objects: list[Object]) -> Iterator[Object]:
    """Kubernetes' own: those that the chart renders, and those that KubeRay makes of its RayService."""
    yield from (each for each in objects if each["apiVersion"] in CORE)
    service = charts.only(objects, "RayService")
    for name, group in {"head": charts.head(service), **charts.worker_groups(service)}.items():
        metadata = {"name": name, **group["template"]["metadata"]}
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": group["template"]["spec"]}
    yield {"apiVersion": "v1", "kind": "Service", **service["spec"]["serveService"]}


def ours(kind: str) -> Object:
    """The fields that the chart renders, and no others."""
    schema: Object = json.loads(Path(__file__).with_name(f"{kind.lower()}.schema.json").read_text(encoding="utf-8"))
    return schema


def crd(name: str) -> Object:
    path = CRDS / f"{name}.json"
    if not path.exists():
        pytest.skip(f"no {path.name} in {CRDS_VARIABLE}: only our own schema is checked")
    schema: Object = json.loads(path.read_text(encoding="utf-8"))
    return closed(schema)


def closed(node: Any) -> Any:
    """The schema, with keys refused that it doesn't know: an API server drops them, and what they said is lost."""
    if isinstance(node, list):
        return [closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    # Patterns are in Go's dialect; one that Python refuses is left out.
    inner = {key: closed(value) for key, value in node.items() if not (key == "pattern" and "(?i)" in value)}
    is_object = isinstance(node.get("properties"), dict) and "type" in node
    return {"additionalProperties": False, **inner} if is_object else inner


@with_values
@pytest.mark.parametrize("version", VERSIONS)
def test_core_objects_are_valid(values: Mapping[str, Any], version: str) -> None:
    objects = list(core_objects(charts.rendered(values)))
    assert {"Pod", "Service", "NetworkPolicy", "ServiceAccount"} <= {each["kind"] for each in objects}
    for each in objects:
        kubernetes_validate.validate(each, version, strict=True)


@with_values
@pytest.mark.parametrize("kind", OTHERS)
def test_other_objects_have_the_fields_that_we_know(values: Mapping[str, Any], kind: str) -> None:
    jsonschema.validate(charts.only(charts.rendered(values, apis=MONITORING), kind), ours(kind))


@with_values
@pytest.mark.parametrize("kind", OTHERS)
def test_other_objects_are_what_their_operators_take(values: Mapping[str, Any], kind: str) -> None:
    jsonschema.validate(charts.only(charts.rendered(values, apis=MONITORING), kind), crd(OTHERS[kind]))


def certificates() -> list[Object]:
    return [each for each in charts.rendered(PRODUCTION) if each["kind"] == "Certificate"]


def test_certificates_have_the_fields_that_we_know() -> None:
    assert len(certificates()) == 3
    for each in certificates():
        jsonschema.validate(each, ours("Certificate"))
    unknown = {**each, "spec": {**each["spec"], "fieldOfNobody": []}}
    with pytest.raises(jsonschema.ValidationError, match="fieldOfNobody"):
        jsonschema.validate(unknown, ours("Certificate"))


def test_alerts_are_what_prometheus_takes(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yml"
    rule = charts.only(charts.rendered(apis=MONITORING), "PrometheusRule")
    rules.write_text(yaml.safe_dump(rule["spec"]), encoding="utf-8")
    subprocess.run([tools.promtool(), "check", "rules", rules], check=True, capture_output=True, timeout=60)


def test_lint_finds_nothing() -> None:
    assert "0 chart(s) failed" in charts.run("lint", "--strict", str(charts.CHART))
