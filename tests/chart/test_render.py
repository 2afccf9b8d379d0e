"""What the chart makes of its values."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import charts
import pytest
import yaml
from charts import MONITORING, PRODUCTION, Object
from packaging.requirements import Requirement

from shoal.cluster.graph import demand, stop_s
from shoal.config import ShoalConfig, load_config
from shoal.wire.certificates import read_certificate

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("golden.yaml")
WRITE_GOLDEN = "SHOAL_WRITE_GOLDEN"
VALUES: Mapping[str, Mapping[str, Any]] = {"defaults": {}, "production": PRODUCTION}


with_values = pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)


def ray_service(values: Mapping[str, Any] | None = None) -> Object:
    return charts.only(charts.rendered(values), "RayService")


def groups(service: Object) -> dict[str, Object]:
    return {"head": charts.head(service), **charts.worker_groups(service)}


def ports(group: Object) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in charts.container(group)["ports"]}


def pods_match(selector: Mapping[str, str], group: Object) -> bool:
    # KubeRay sets this one.
    return dict(selector).items() <= {**group["template"]["metadata"]["labels"], "ray.io/serve": "true"}.items()


def test_objects_are_as_they_were() -> None:
    """Where nearly every value is set."""
    text = charts.text_of(PRODUCTION)
    if os.environ.get(WRITE_GOLDEN):
        GOLDEN.write_text(text, encoding="utf-8")
    was = list(yaml.safe_load_all(GOLDEN.read_text(encoding="utf-8")))
    # As objects: another helm may set its lines otherwise.
    assert list(yaml.safe_load_all(text)) == was, (
        f"if that is meant: {WRITE_GOLDEN}=1 pytest tests/chart/test_render.py"
    )


@with_values
def test_the_configuration_loads(values: Mapping[str, Any]) -> None:
    config = load_config(**charts.shoal_config(ray_service(values)))
    assert (config.ray.address, config.gateway.host, config.gateway.resource) == ("auto", "0.0.0.0", "gateway")
    assert (config.handoff.host, config.metrics.host) == ("auto", "auto")
    assert config.gateway.reflection is False


@with_values
def test_ray_serve_takes_the_file(values: Mapping[str, Any]) -> None:
    from ray.serve.schema import ServeDeploySchema

    service = ray_service(values)
    schema = ServeDeploySchema.model_validate(charts.serve_config(service))
    assert schema.proxy_location == "HeadOnly"
    assert schema.http_options.port == load_config(**charts.shoal_config(service)).gateway.port
    (application,) = schema.applications
    assert (application.name, application.import_path) == (ShoalConfig().ray.app_name, "shoal.cluster:build")


@with_values
def test_nodes_offer_what_the_application_demands(values: Mapping[str, Any]) -> None:
    service = ray_service(values)
    offered: dict[str, float] = {"CPU": 0.0, "GPU": 0.0}
    for group in groups(service).values():
        start = group["rayStartParams"]
        node = {"CPU": float(start["num-cpus"]), "GPU": float(start["num-gpus"]), **charts.node_resources(group)}
        for name, amount in node.items():
            offered[name] = offered.get(name, 0.0) + amount * group.get("replicas", 1)
    wanted = demand(load_config(**charts.shoal_config(service)))
    assert {name: offered.get(name, 0.0) for name in wanted} == wanted
    assert offered["gateway"] == 1
    assert charts.node_resources(charts.head(service)) == {"gateway": 1}, "the head carries no pool"


def test_certificates_are_where_the_configuration_says() -> None:
    service = ray_service(PRODUCTION)
    tls = load_config(**charts.shoal_config(service)).gateway.tls
    assert tls is not None
    assert tls.client_ca_file is not None
    (mount,) = (each for each in charts.container(charts.head(service))["volumeMounts"] if each["name"] == "tls")
    assert {str(path.parent) for path in (tls.cert_file, tls.key_file, tls.client_ca_file)} == {mount["mountPath"]}
    volumes = charts.head(service)["template"]["spec"]["volumes"]
    assert {"name": "tls", "secret": {"secretName": "tls"}} in volumes
    for group in charts.worker_groups(service).values():
        assert "tls" not in {volume["name"] for volume in group["template"]["spec"]["volumes"]}


def test_each_pod_has_its_role_s_certificate_where_the_configuration_says(tmp_path: Path) -> None:
    objects = charts.rendered()
    tls = load_config(**charts.shoal_config(charts.only(objects, "RayService"))).tls
    assert tls is not None and tls != "off"
    for role, folder in charts.certificates(objects, tmp_path).items():
        group = groups(charts.only(objects, "RayService"))["head" if role == "gateway" else role]
        (mount,) = (each for each in charts.container(group)["volumeMounts"] if each["name"] == "certs")
        assert (mount["mountPath"], mount["readOnly"]) == (str(tls.folder / role), True)
        assert folder == tmp_path / role
        read_certificate(tmp_path, role)


@pytest.mark.parametrize(
    "tls",
    [
        {"from": "secrets", "secrets": {"gateway": "g", "prefill": "p", "decode": "d"}},
        {"from": "cert-manager", "issuer": {"name": "shoal"}},
    ],
    ids=["secrets", "cert-manager"],
)
def test_each_pod_mounts_its_role_s_secret_and_no_other(tls: Mapping[str, Any]) -> None:
    objects = charts.rendered({"tls": tls})
    assert "Secret" not in {each["kind"] for each in objects}
    made = {
        each["spec"]["dnsNames"][0].partition(".")[0]: each["spec"]["secretName"]
        for each in objects
        if each["kind"] == "Certificate"
    }
    for name, group in groups(charts.only(objects, "RayService")).items():
        role = "gateway" if name == "head" else name
        mounted = [each["secret"]["secretName"] for each in group["template"]["spec"]["volumes"] if "secret" in each]
        assert mounted == [(made or tls["secrets"])[role]]


@pytest.mark.parametrize("off", ["off", False])
def test_without_certificates_the_configuration_says_so(off: object) -> None:
    objects = charts.rendered({"tls": {"from": off}})
    assert load_config(**charts.shoal_config(charts.only(objects, "RayService"))).tls == "off"
    assert "Secret" not in {each["kind"] for each in objects}
    for group in groups(charts.only(objects, "RayService")).values():
        assert not [each for each in group["template"]["spec"]["volumes"] if "secret" in each]
    assert "tls is off" in charts.notes({"tls": {"from": off}})
    assert "tls is off" not in charts.notes()


def test_keys_reach_the_gateway_and_those_who_ask_for_the_operator() -> None:
    objects = charts.rendered(PRODUCTION, apis=MONITORING)
    service = charts.only(objects, "RayService")
    keys_file = load_config(**charts.shoal_config(service)).gateway.keys_file
    (mount,) = (each for each in charts.container(charts.head(service))["volumeMounts"] if each["name"] == "keys")
    assert keys_file == Path(mount["mountPath"]) / "keys.yaml"
    for group in charts.worker_groups(service).values():
        assert "keys" not in {volume["name"] for volume in group["template"]["spec"]["volumes"]}
    (source,) = charts.only(objects, "ScrapeConfig")["spec"]["httpSDConfigs"]
    assert source["authorization"] == {"credentials": {"name": "key", "key": "metrics-key"}}
    (variable,) = charts.only(objects, "Pod")["spec"]["containers"][0]["env"]
    assert variable["name"] == "SHOAL_API_KEY"
    assert variable["valueFrom"] == {"secretKeyRef": {"name": "key", "key": "test-key"}}
    assert "credentials_file" in charts.notes(PRODUCTION) and "Bearer KEY" in charts.notes(PRODUCTION)


@with_values
def test_every_container_is_locked_up(values: Mapping[str, Any]) -> None:
    objects = charts.rendered(values)
    templates = [group["template"] for group in groups(charts.only(objects, "RayService")).values()]
    for pod in [*templates, charts.only(objects, "Pod")]:
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["spec"]["automountServiceAccountToken"] is False
        for container in pod["spec"]["containers"]:
            context = container["securityContext"]
            assert (context["readOnlyRootFilesystem"], context["allowPrivilegeEscalation"]) == (True, False)
            assert context["capabilities"]["drop"] == ["ALL"]


@pytest.mark.parametrize("drain_s", [2.0, 7.3])
def test_a_pod_outlives_its_drain(drain_s: float) -> None:
    service = ray_service({"config": {"handoff": {"drain_s": drain_s}}, "drain": {"deadline_s": 90}})
    closing_s = stop_s(load_config(**charts.shoal_config(service)))
    for group in charts.worker_groups(service).values():
        assert (
            "--deadline-remaining-seconds 90 " in charts.container(group)["lifecycle"]["preStop"]["exec"]["command"][2]
        )
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] >= 90 + closing_s


@pytest.mark.parametrize(("port", "grpc_port"), [(8000, 9000), (8081, 9090)])
def test_ports_are_the_configuration_s_everywhere(port: int, grpc_port: int) -> None:
    is_default = (port, grpc_port) == (8000, 9000)
    objects = charts.rendered({} if is_default else {"config": {"gateway": {"port": port, "grpc_port": grpc_port}}})
    service = charts.only(objects, "RayService")
    config = load_config(**charts.shoal_config(service)).gateway
    assert (config.port, config.grpc_port) == (port, grpc_port)
    head = ports(charts.head(service))
    assert (head["serve"], head["serve-grpc"]) == (port, grpc_port)
    assert [each["port"] for each in service["spec"]["serveService"]["spec"]["ports"]] == [port, grpc_port]
    clients = charts.only(objects, "NetworkPolicy")["spec"]["ingress"][1]
    assert [each["port"] for each in clients["ports"]] == [port, grpc_port]


@with_values
def test_the_service_that_kuberay_turns_at_an_upgrade_carries_grpc_too(values: Mapping[str, Any]) -> None:
    service = ray_service(values)
    # KubeRay 1.6 keeps those of our ports that the head's container names, as serve or serve-….
    http, grpc = service["spec"]["serveService"]["spec"]["ports"]
    assert {http["name"], grpc["name"]} == {name for name in ports(charts.head(service)) if name.startswith("serve")}
    assert ("appProtocol" in grpc) is (load_config(**charts.shoal_config(service)).gateway.tls is None)


@with_values
def test_no_worker_is_behind_the_service_that_kuberay_makes(values: Mapping[str, Any]) -> None:
    """Its selector takes in workers, too, so it finds its ports by names that they don't have."""
    service = ray_service(values)
    targets = {each["targetPort"] for each in service["spec"]["serveService"]["spec"]["ports"]}
    assert targets <= ports(charts.head(service)).keys()
    for group in charts.worker_groups(service).values():
        assert targets.isdisjoint(ports(group))


def test_without_grpc_nothing_of_it_is_there() -> None:
    objects = charts.rendered({"config": {"gateway": {"grpc_port": 0}}})
    assert len(charts.only(objects, "RayService")["spec"]["serveService"]["spec"]["ports"]) == 1
    assert "serve-grpc" not in ports(charts.head(charts.only(objects, "RayService")))


def test_the_network_policy_holds_for_all_pods_and_lets_prometheus_read() -> None:
    objects = charts.rendered()
    policy = charts.only(objects, "NetworkPolicy")["spec"]
    selector = policy["podSelector"]["matchLabels"]
    assert all(pods_match(selector, group) for group in groups(charts.only(objects, "RayService")).values())
    assert selector.items() <= charts.only(objects, "Pod")["metadata"]["labels"].items()
    among_themselves, _, prometheus, _ = policy["ingress"]
    others = {"key": "app.kubernetes.io/component", "operator": "NotIn", "values": ["test"]}
    assert among_themselves == {"from": [{"podSelector": {"matchLabels": selector, "matchExpressions": [others]}}]}
    metrics = ShoalConfig().metrics.port_range
    assert {"protocol": "TCP", "port": metrics.first, "endPort": metrics.last} in prometheus["ports"]


@pytest.mark.parametrize("others", [{"clients": [], "prometheus": []}, {"clients": []}], ids=["nobody", "prometheus"])
def test_the_pod_that_tests_reaches_what_it_asks_and_none_of_ray_s_ports(others: Mapping[str, Any]) -> None:
    objects = charts.rendered({"networkPolicy": others})
    rules = charts.only(objects, "NetworkPolicy")["spec"]["ingress"]

    def reached(labels: Mapping[str, str]) -> list[object]:
        return [
            rule.get("ports")  # none says all of them
            for rule in rules
            for peer in rule["from"]
            if "namespaceSelector" not in peer and selects(peer["podSelector"], labels)
        ]

    metrics = {"protocol": "TCP", "port": 22000, "endPort": 22999}
    asked = [{"protocol": "TCP", "port": 8000}, metrics]
    assert reached(charts.only(objects, "Pod")["metadata"]["labels"]) == [asked]
    for group in groups(charts.only(objects, "RayService")).values():
        assert reached(group["template"]["metadata"]["labels"]) == [None]


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    expressions = selector.get("matchExpressions", ())
    assert {each["operator"] for each in expressions} <= {"NotIn"}
    is_left_out = any(labels.get(each["key"]) in each["values"] for each in expressions)
    return selector["matchLabels"].items() <= labels.items() and not is_left_out


def test_only_pools_with_a_replica_to_spare_get_a_disruption_budget() -> None:
    def budgets(values: Mapping[str, Any]) -> list[str]:
        kinds = [each for each in charts.rendered(values) if each["kind"] == "PodDisruptionBudget"]
        return [each["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"] for each in kinds]

    assert budgets({}) == []
    assert budgets({"decode": {"replicas": 2}}) == ["decode"]
    assert budgets({"decode": {"replicas": 2}, "podDisruptionBudget": {"enabled": False}}) == []


def test_a_spare_pod_carries_no_replica_and_one_pod_may_go_at_a_time() -> None:
    objects = charts.rendered({"prefill": {"replicas": 2}, "decode": {"spare": 1}})
    service = charts.only(objects, "RayService")
    pools = charts.worker_groups(service).items()
    sizes = {name: {group[key] for key in ("replicas", "minReplicas", "maxReplicas")} for name, group in pools}
    assert sizes == {"prefill": {2}, "decode": {2}}
    config = load_config(**charts.shoal_config(service))
    assert (config.prefill.replicas, config.decode.replicas) == (2, 1)
    assert [each["spec"]["minAvailable"] for each in objects if each["kind"] == "PodDisruptionBudget"] == [1, 1]


@pytest.mark.parametrize(
    "change",
    [
        {"decode": {"replicas": 2}},
        {"decode": {"spare": 1}},
        {"config": {"log": {"level": "debug"}}},
        {"prefill": {"tolerations": [{"key": "gpu", "operator": "Exists"}]}},
        {"gateway": {"service": {"type": "NodePort"}}, "networkPolicy": {"enabled": False}},
    ],
    ids=str,
)
def test_what_kuberay_does_not_see_by_itself_changes_a_pod(change: Mapping[str, Any]) -> None:
    def pods(values: Mapping[str, Any]) -> list[Any]:
        return [
            group["template"]["metadata"]["annotations"]["checksum/config"]
            for group in groups(ray_service(values)).values()
        ]

    assert pods({}) == pods({"podDisruptionBudget": {"enabled": False}})
    assert pods(change) != pods({})


def test_an_old_cluster_lives_until_its_last_answer() -> None:
    assert ray_service()["spec"]["rayClusterDeletionDelaySeconds"] == ShoalConfig().gateway.deadline_s
    service = ray_service({"config": {"gateway": {"deadline_s": 90.5}}})
    assert service["spec"]["rayClusterDeletionDelaySeconds"] == 91


@pytest.mark.parametrize(
    ("enabled", "apis", "is_there"),
    [("auto", (), False), ("auto", MONITORING, True), (True, (), True), (False, MONITORING, False)],
)
def test_monitoring_is_made_where_it_is_wanted(enabled: object, apis: tuple[str, ...], is_there: bool) -> None:
    monitoring = {name: {"enabled": enabled} for name in ("scrapeConfig", "prometheusRule")}
    kinds = {each["kind"] for each in charts.rendered({"monitoring": monitoring}, apis=apis)}
    assert ({"ScrapeConfig", "PrometheusRule"} & kinds == {"ScrapeConfig", "PrometheusRule"}) is is_there
    assert bool({"ScrapeConfig", "PrometheusRule"} & kinds) is is_there


@pytest.mark.parametrize(
    ("values", "job"), [({}, charts.RELEASE), *(({"monitoring": {"job": job}}, job) for job in ("reef/fish", "123"))]
)
def test_a_release_has_a_job_of_its_own_wherever_prometheus_is_asked(values: Mapping[str, Any], job: str) -> None:
    """Two releases under one Prometheus would hide one another's alerts."""
    monitoring = {**values.get("monitoring", {}), "dashboard": {"enabled": True}}
    objects = charts.rendered({"monitoring": monitoring}, apis=MONITORING)
    rules = [rule for group in charts.only(objects, "PrometheusRule")["spec"]["groups"] for rule in group["rules"]]
    assert {rule["labels"]["job"] for rule in rules} == {job}
    for expression in (rule["expr"] for rule in rules):
        selectors = re.findall(r"\bshoal_\w+|\bup\b", expression)
        assert expression.count(f'job="{job}"') == len(selectors) > 0, expression
    dashboard = charts.only(objects, "ConfigMap")["data"]["shoal.json"]
    assert set(re.findall(r'job=\\"(.+?)\\"', dashboard)) == {job}
    assert json.loads(dashboard)["uid"] == job.replace("/", "-"), "Grafana takes no other characters"
    relabelled = {"targetLabel": "job", "replacement": job}
    assert relabelled in charts.only(objects, "ScrapeConfig")["spec"]["relabelings"]


def test_versions_are_those_of_the_package() -> None:
    chart = yaml.safe_load((charts.CHART / "Chart.yaml").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert chart["appVersion"] == project["version"]
    wanted = map(Requirement, project["optional-dependencies"]["serve"])
    (ray,) = (requirement for requirement in wanted if requirement.name == "ray")
    assert ray_service()["spec"]["rayClusterConfig"]["rayVersion"] in ray.specifier
