"""docker-compose.yml, as the real Compose reads it: what it starts fits together, and with the configuration."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from ray.scripts import scripts as ray_commands
from typer.testing import CliRunner

from shoal.cli import app
from shoal.cluster.graph import demand
from shoal.config import ShoalConfig, load_config

ROOT = Path(__file__).parents[2]
NODES = ("gateway", "prefill", "decode")
TOKEN = "a-token-of-this-test"


def compose(**environment: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("docker-compose")
    if not program.exists():
        pytest.skip("docker-compose isn't here: install the dev extra")
    return subprocess.run(
        # Not the .env of whoever runs this.
        [program, "--env-file", os.devnull, "--profile", "*", "--file", ROOT / "docker-compose.yml", "config",
         "--format", "json"],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def services(**environment: str) -> dict[str, Any]:
    done = compose(RAY_AUTH_TOKEN=TOKEN, **environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["services"]
    return found


@pytest.fixture(scope="module")
def shipped() -> dict[str, Any]:
    return services()


def commands(service: dict[str, Any]) -> list[list[str]]:
    """What the container runs, one after the other, as words."""
    words = [*service["entrypoint"], *service["command"]]
    if words[:2] != ["sh", "-ec"]:
        return [words]
    lines = words[2].replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix("exec ")) for line in lines]


def ray_start(service: dict[str, Any]) -> dict[str, Any]:
    """The options of ``ray start``, as Ray's own command line parses them."""
    program, command, *words = commands(service)[0]
    assert (program, command) == ("ray", "start")
    options: dict[str, Any] = ray_commands.start.make_context(command, words).params
    return options


def configuration(found: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> ShoalConfig:
    """What ``shoal serve`` would read in the gateway's container."""
    gateway = found["gateway"]
    for name, value in gateway["environment"].items():
        monkeypatch.setenv(name, value)
    program, command, path = commands(gateway)[-1]
    assert (program, command) == ("shoal", "serve")
    mounts = {one["target"]: Path(one["source"]) for one in gateway["volumes"]}
    return load_config(mounts[path])


def published(service: dict[str, Any]) -> dict[int, str]:
    return {port["target"]: port["host_ip"] for port in service.get("ports", ())}


# --- the token ------------------------------------------------------------------------------------------


def test_without_a_token_nothing_starts_and_the_message_says_what_to_do() -> None:
    done = compose()
    assert done.returncode != 0
    assert "RAY_AUTH_TOKEN" in done.stderr and "openssl rand -hex 32" in done.stderr


def test_all_nodes_have_one_token_and_demand_it(shipped: dict[str, Any]) -> None:
    environments = [shipped[name]["environment"] for name in NODES]
    assert [(one["RAY_AUTH_MODE"], one["RAY_AUTH_TOKEN"]) for one in environments] == [("token", TOKEN)] * len(NODES)


# --- the nodes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [{}, {"PREFILL_REPLICAS": "2", "DECODE_REPLICAS": "3"}])
def test_nodes_offer_exactly_the_resources_that_the_configuration_asks_for(
    replicas: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = services(**replicas)
    offered: Counter[str] = Counter()
    for name in NODES:
        for resource, amount in json.loads(ray_start(found[name])["resources"]).items():
            offered[resource] += amount * found[name].get("scale", 1)
    wanted = demand(configuration(found, monkeypatch))
    assert offered == {name: amount for name, amount in wanted.items() if name in NODES}
    assert offered.keys() == set(NODES)


def test_pools_join_the_gateways_cluster(shipped: dict[str, Any]) -> None:
    head = ray_start(shipped["gateway"])
    assert head["head"] and not head["block"]
    for name in ("prefill", "decode"):
        pool = ray_start(shipped[name])
        assert pool["block"] and pool["address"] == f"gateway:{head['port']}"
        assert shipped[name]["depends_on"].keys() == {"certs", "gateway"}


def test_open_requests_may_finish_before_the_gateway_is_killed(
    shipped: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    grace_s = float(shipped["gateway"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > 2 * configuration(shipped, monkeypatch).handoff.drain_s


# --- certificates ---------------------------------------------------------------------------------------


def volumes(service: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    """Docker's own by what they are mounted at: their names, and whether they are only read."""
    return {
        one["target"]: (one["source"], one.get("read_only", False))
        for one in service.get("volumes", ())
        if one["type"] == "volume"
    }


def test_certificates_are_made_before_any_node_starts(
    shipped: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tls = configuration(shipped, monkeypatch).tls
    assert tls is not None and tls != "off"
    command, folder, *options = shipped["certs"]["command"]
    assert (command, folder) == ("certs", str(tls.folder))
    # Also where they are there already, as after the first start.
    for _ in range(2):
        assert CliRunner().invoke(app, [command, str(tmp_path), *options]).exit_code == 0
    for name in NODES:
        assert shipped[name]["depends_on"]["certs"]["condition"] == "service_completed_successfully"


def test_a_node_reads_its_own_role_s_certificate_and_none_the_authority_s_key(
    shipped: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = configuration(shipped, monkeypatch).tls
    assert tls is not None and tls != "off"
    made = volumes(shipped["certs"])
    assert made.keys() == {str(tls.folder), *(str(tls.folder / name) for name in NODES)}
    assert not any(is_read_only for _, is_read_only in made.values())
    for name in NODES:
        home = str(tls.folder / name)
        assert volumes(shipped[name]) == {home: (made[home][0], True)}


# --- from outside ---------------------------------------------------------------------------------------


def test_ports_are_published_on_loopback_alone(shipped: dict[str, Any]) -> None:
    addresses = {address for service in shipped.values() for address in published(service).values()}
    assert addresses == {"127.0.0.1"}


def test_the_gateways_ports_are_those_of_the_configuration(
    shipped: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = configuration(shipped, monkeypatch).gateway
    assert published(shipped["gateway"]).keys() == {gateway.port, gateway.grpc_port}
    assert gateway.host == "0.0.0.0"
    [url] = re.findall(r'"(http://[^"]+)"', shipped["gateway"]["healthcheck"]["test"][-1])
    assert (urlsplit(url).port, urlsplit(url).path) == (gateway.port, "/readyz")


def test_no_container_may_do_more_than_it_needs(shipped: dict[str, Any]) -> None:
    for name, service in shipped.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged") and not service.get("network_mode"), name


# --- who watches ----------------------------------------------------------------------------------------


def test_prometheus_asks_the_gateway_who_there_is(shipped: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    [option] = [word for word in shipped["prometheus"]["command"] if word.startswith("--config.file=")]
    path = Path(option.partition("=")[2])
    mounts = {one["target"]: Path(one["source"]) for one in shipped["prometheus"]["volumes"]}
    document = yaml.safe_load((mounts[str(path.parent)] / path.name).read_text())
    [job] = document["scrape_configs"]
    [discovery] = job["http_sd_configs"]
    url = urlsplit(discovery["url"])
    assert url.hostname in shipped
    assert (url.port, url.path) == (configuration(shipped, monkeypatch).gateway.port, "/metrics/targets")


def test_grafana_finds_prometheus_and_the_dashboard(shipped: dict[str, Any]) -> None:
    assert shipped["grafana"]["profiles"] == ["grafana"]
    provisioning = ROOT / "deploy/grafana/provisioning"
    mounts = {one["source"]: one["target"] for one in shipped["grafana"]["volumes"] if one["type"] == "bind"}
    [source] = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == f"http://prometheus:{next(iter(published(shipped['prometheus'])))}"
    [provider] = yaml.safe_load((provisioning / "dashboards/shoal.yml").read_text())["providers"]
    dashboard = Path(mounts[str(ROOT / "deploy/grafana/shoal.json")])
    assert str(dashboard.parent) == provider["options"]["path"]
    assert mounts[str(provisioning)] == "/etc/grafana/provisioning"


def test_everything_that_is_mounted_is_in_the_repository(shipped: dict[str, Any]) -> None:
    sources = [one["source"] for service in shipped.values() for one in service.get("volumes", ())]
    paths = [Path(source) for source in sources if source.startswith("/")]
    assert paths and all(path.exists() and path.is_relative_to(ROOT) for path in paths)
