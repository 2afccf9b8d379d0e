"""docker-compose.yml without containers: each service's own command, on a host of its own, Prometheus included."""

from __future__ import annotations

import json
import math
import operator
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import compose
import pytest
import tools
from cryptography import x509
from netns import network
from nodes import (
    ENVIRONMENT,
    HOSTS,
    ROOT,
    URL,
    Client,
    Question,
    assert_each_role_has_its_node,
    assert_hands_off,
)

from shoal.cluster.certificates import ROLES
from shoal.config import ShoalConfig
from shoal.wire.certificates import CHAIN_FILE, KEY_FILE

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

PROMETHEUS = "http://prometheus:9090"
SHOAL = Path(sys.executable).with_name("shoal")
DASHBOARD = ROOT / "deploy" / "grafana" / "shoal.json"
# What Grafana puts in, for a panel of a few hours and the data source's default scrape interval.
VARIABLES = {"$__rate_interval": "1m", "$__interval": "15s"}
# What a panel draws while nothing happens, and what does happen here, so that it needs data of its own.
OTHERWISE = " or on () vector(0)"
HAPPENS = ("(shoal_requests_total[", "(shoal_kv_transfer_seconds_count[", "(shoal_kv_transfer_bytes_total[")


READY = '"ready"'


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("volumes")


@pytest.fixture(scope="module")
def client(volumes: Path) -> Iterator[Client]:
    services = compose.services()
    with network(*HOSTS, "prometheus") as hosts:
        # On a host that another service then has: it ends before they begin.
        replace(services["certs"], name="gateway").start(hosts, program=SHOAL, folder=volumes)
        assert hosts.process("gateway").ended(within_s=60) == 0, hosts.process("gateway").tail()
        for name in ("gateway", "prefill", "decode"):
            services[name].start(hosts, folder=volumes)
        found = Client(hosts)
        # 200 as soon as decode can answer, which it does without prefill, too.
        found.until(lambda: found.get(f"{URL}/readyz"), lambda answer: answer.status == 200 and READY in answer.body)
        yield found


def test_a_completion_crosses_from_the_prefill_node_to_the_decode_node(client: Client):
    assert_hands_off(client)


def test_it_crosses_by_tls_with_the_certificates_that_were_made(client: Client, volumes: Path):
    look = client.look()
    for role in ROLES:
        found = x509.load_pem_x509_certificate((volumes / f"{role}-certs" / CHAIN_FILE).read_bytes())
        expires_s = found.not_valid_after_utc.timestamp()
        assert look.metric("shoal_certificate_expiry_timestamp_seconds", role=role) == expires_s
    port = ShoalConfig().handoff.port_range.first
    asked = f"import ssl; print(ssl.get_server_certificate(('decode', {port})))"
    shown = client.network.run("client", [sys.executable, "-c", asked])
    assert shown.stdout.strip() == (volumes / "decode-certs" / CHAIN_FILE).read_text().strip(), shown.stderr


def test_a_node_has_its_own_role_s_key_and_no_other(client: Client):
    for role in ROLES:
        found = client.network.execute(role, ["find", "/etc/shoal/certs", "-name", "*.key"])
        assert found.stdout.split() == [f"/etc/shoal/certs/{role}/{KEY_FILE}"]


def test_each_role_has_its_node(client: Client):
    assert_each_role_has_its_node(client)


def test_grpc_says_that_it_serves(client: Client):
    assert client.grpc_health() == "SERVING"


@pytest.mark.parametrize("name", ["gateway", "prefill", "decode"])
def test_the_healthcheck_of_a_service_passes(client: Client, name: str):
    done = client.network.run(name, compose.services()[name].healthcheck, ENVIRONMENT)
    assert done.returncode == 0, done.stderr


# --- Prometheus -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prometheus(client: Client) -> Client:
    """The same client, with the real server beside the nodes."""
    compose.services()["prometheus"].start(client.network, program=tools.prometheus())
    client.until(lambda: client.get(f"{PROMETHEUS}/-/ready").status == 200, within_s=30)
    return client


def query(client: Client, *expressions: str) -> list[list[Any]]:
    """What Prometheus answers now: for each expression its samples, each with ``metric`` and ``value``."""
    urls = [f"{PROMETHEUS}/api/v1/query?{urlencode({'query': one})}" for one in expressions]
    return [answer.json()["data"]["result"] for answer in client.ask(*map(Question, urls))]


def test_prometheus_finds_and_reads_every_role(prometheus: Client):
    def ups() -> dict[str, str]:
        [samples] = query(prometheus, "up")
        return {sample["metric"]["role"]: sample["value"][1] for sample in samples}

    prometheus.until(ups, lambda seen: seen == {"gateway": "1", "prefill": "1", "decode": "1"}, within_s=60)


def test_every_query_of_the_dashboard_returns_data(prometheus: Client):
    expressions = [needing_data(expression) for expression in dashboard_queries()]
    assert len(expressions) > 20
    assert len({*expressions} - {*dashboard_queries()}) == len(HAPPENS) + 1  # bytes by part, and by carrier

    def without_data() -> list[str]:
        # A rate needs something that happens between two looks of Prometheus'.
        prometheus.complete(max_tokens=8)
        results = query(prometheus, *expressions)
        return [one for one, samples in zip(expressions, results, strict=True) if not has_numbers(samples)]

    prometheus.until(without_data, operator.not_, within_s=90)


def dashboard_queries() -> list[str]:
    """The expressions of all panels, with Grafana's variables filled in."""
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    found = [target["expr"] for panel in flat(panels) for target in panel.get("targets", [])]
    for name, value in VARIABLES.items():
        found = [expression.replace(name, value) for expression in found]
    assert not any("$" in expression for expression in found)
    return found


def needing_data(expression: str) -> str:
    return expression.removesuffix(OTHERWISE) if any(name in expression for name in HAPPENS) else expression


def flat(panels: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows that are folded hold their panels."""
    for panel in panels:
        yield panel
        yield from flat(panel.get("panels", []))


def has_numbers(samples: Sequence[dict[str, Any]]) -> bool:
    # Nothing divided by nothing is a sample, too, but nothing to draw.
    return any(not math.isnan(float(sample["value"][1])) for sample in samples)


# --- what ends, Compose starts again: `restart: unless-stopped` -----------------------------------------


@pytest.mark.long
def test_nodes_of_the_pools_that_were_killed_join_again(client: Client, volumes: Path):
    pools = ("prefill", "decode")
    gone = {replica for replica in client.replicas() if replica[0] in pools}
    for name in pools:
        compose.services()[name].start(client.network, folder=volumes)

    def all_are_new(seen: set[tuple[str, str]]) -> bool:
        return not seen & gone and {role for role, _ in seen} == {"gateway", *pools}

    client.until(client.replicas, all_are_new)
    assert_hands_off(client)


# The last one: no cluster is left.
@pytest.mark.long
def test_a_gateway_whose_ray_died_ends_and_so_do_nodes_that_lost_their_head(client: Client, volumes: Path):
    hosts = client.network
    killed = hosts.execute("gateway", ["pkill", "-KILL", "-x", "raylet"])
    assert killed.returncode == 0, killed.stderr
    assert hosts.process("gateway").ended(within_s=60) != 0
    # Anywhere: of Ray's last words, which go on after it, there are more or fewer each time.
    assert "Ray has ended" in hosts.process("gateway").log.read_text()
    compose.services()["gateway"].start(hosts, folder=volumes)
    for name in ("prefill", "decode"):
        assert hosts.process(name).ended(within_s=120) != 0
