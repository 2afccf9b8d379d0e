"""What the Helm chart renders, carried out: Ray nodes as its groups say, with its Serve config."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import kuberay
import pytest
from charts import Object, certificates, container, head, only, rendered, serve_config, worker_groups
from netns import network
from nodes import ENVIRONMENT, HOSTS, Client, Question, assert_each_role_has_its_node, assert_hands_off

from shoal.backends.cpu.build import FOLDER_VARIABLE, library
from shoal.errors import ConfigError

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

Group = dict[str, Any]
OTHER = "prefill-2"


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    return rendered()


@pytest.fixture(scope="module")
def groups(objects: list[Object]) -> dict[str, Group]:
    """By the host that carries a pod of each."""
    service = only(objects, "RayService")
    return {"gateway": head(service), **worker_groups(service)}


@pytest.fixture(scope="module")
def mounts(
    objects: list[Object], groups: dict[str, Group], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Path]]:
    """By the same hosts, the Secret of its role where its pod mounts it."""
    homes = certificates(objects, tmp_path_factory.mktemp("secrets"))
    return {
        role: {
            mount["mountPath"]: homes[role]
            for mount in container(groups[role])["volumeMounts"]
            if mount["name"] == "certs"
        }
        for role in homes
    }


@pytest.fixture(scope="module")
def client(objects: list[Object], groups: dict[str, Group], mounts: dict[str, dict[str, Path]]) -> Iterator[Client]:
    with network(*HOSTS, OTHER) as hosts:
        head_group = groups["gateway"]
        kuberay.start_head(hosts, head_group["rayStartParams"], environment(head_group), mounts["gateway"])
        for pool in ("prefill", "decode"):
            group = groups[pool]
            kuberay.start_worker(hosts, pool, group["rayStartParams"], environment(group), mounts[pool])
        found = Client(hosts)
        kuberay.deploy(found, serve_config(only(objects, "RayService")))
        yield found


def environment(group: Group) -> dict[str, str]:
    # A pod's /tmp is a volume of its own; a host's is below /run.
    found = {entry["name"]: entry["value"].replace("/tmp", "/run") for entry in container(group)["env"]}
    with suppress(ConfigError):  # without a compiler there are none
        # An image brings its kernels along; here each pod would compile them.
        found[FOLDER_VARIABLE] = str(library().parent)
    return found


def test_a_completion_crosses_from_the_prefill_pod_to_the_decode_pod(client: Client):
    assert_hands_off(client)


def test_each_group_carries_its_role(client: Client):
    assert_each_role_has_its_node(client)


def test_grpc_says_that_it_serves(client: Client):
    assert client.grpc_health() == "SERVING"


def test_the_probes_of_every_pod_succeed(client: Client, groups: dict[str, Group]):
    asked = [
        Question(f"http://{host}:{ports[probe['port']]}{probe['path']}")
        for host, group in groups.items()
        for ports in [{port["name"]: port["containerPort"] for port in container(group)["ports"]}]
        for kind in ("startupProbe", "readinessProbe", "livenessProbe")
        for probe in [container(group)[kind]["httpGet"]]
    ]
    answers = client.ask(*asked)
    assert [(question.url, answer.status) for question, answer in zip(asked, answers, strict=True)] == [
        (question.url, 200) for question in asked
    ]


@pytest.mark.long
def test_a_pod_that_goes_away_hands_its_replica_over_first(
    client: Client, groups: dict[str, Group], mounts: dict[str, dict[str, Path]]
):
    """The hook that Kubernetes awaits: clients notice nothing, and then the pod may end."""
    group, hosts = groups["prefill"], client.network
    kuberay.start_worker(hosts, OTHER, group["rayStartParams"], environment(group), mounts["prefill"])
    command = container(group)["lifecycle"]["preStop"]["exec"]["command"]
    before = client.look()
    num_answered = 0
    with ThreadPoolExecutor() as other_thread:
        hook = other_thread.submit(hosts.execute, "prefill", command, {**ENVIRONMENT, **environment(group)})
        while not hook.done():
            assert client.complete()["choices"][0]["text"]
            num_answered += 1
    assert hook.result().returncode == 0, hook.result().stderr
    assert num_answered > 3
    listed = client.addresses_by_role()
    assert ("prefill", hosts.addresses[OTHER]) in listed and ("prefill", hosts.addresses["prefill"]) not in listed
    after = client.look()
    for name in ("shoal_kv_fallback_total", "shoal_retries_total"):
        assert after.metric(name) == before.metric(name), kuberay.warnings(hosts)
