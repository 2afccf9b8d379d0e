"""deploy/serve.yaml on a Ray cluster of three nodes, deployed over the head's HTTP API."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import yaml

import kuberay
from netns import network
from nodes import HOSTS, ROOT, Client, assert_each_role_has_its_node, assert_hands_off

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with network(*HOSTS) as hosts:
        kuberay.start_head(hosts, {"num-cpus": "0", "resources": """'{"gateway": 1}'"""})
        for pool in ("prefill", "decode"):
            kuberay.start_worker(hosts, pool, {"num-cpus": "1", "resources": f"""'{{"{pool}": 1}}'"""})
        found = Client(hosts)
        kuberay.deploy(found, yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text(encoding="utf-8")))
        yield found


def test_a_completion_crosses_from_the_prefill_node_to_the_decode_node(client: Client):
    assert_hands_off(client)


def test_each_role_has_its_node(client: Client):
    assert_each_role_has_its_node(client)


def test_grpc_says_that_it_serves(client: Client):
    assert client.grpc_health() == "SERVING"
