"""deploy/serve.yaml on a Ray cluster of three nodes, deployed over the head's HTTP API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import kuberay
import pytest
import yaml
from netns import network
from nodes import HOSTS, ROOT, Client, assert_each_role_has_its_node, assert_hands_off

from shoal.cluster.certificates import make_certificates

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("certs")
    make_certificates(folder, days=1)

    def mounts(role: str) -> dict[str, Path]:
        return {f"/etc/shoal/certs/{role}": folder / role}

    with network(*HOSTS) as hosts:
        params = {"num-cpus": "0", "resources": """'{"gateway": 1}'"""}
        kuberay.start_head(hosts, params, mounts=mounts("gateway"))
        for pool in ("prefill", "decode"):
            params = {"num-cpus": "1", "resources": f"""'{{"{pool}": 1}}'"""}
            kuberay.start_worker(hosts, pool, params, mounts=mounts(pool))
        found = Client(hosts)
        kuberay.deploy(found, yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text(encoding="utf-8")))
        yield found


def test_a_completion_crosses_from_the_prefill_node_to_the_decode_node(client: Client):
    assert_hands_off(client)


def test_each_role_has_its_node(client: Client):
    assert_each_role_has_its_node(client)


def test_grpc_says_that_it_serves(client: Client):
    assert client.grpc_health() == "SERVING"
