from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from shoal.cluster.graph import KEPT_PRODUCTS, Replicas, bind, build, demand, with_gateway
from shoal.config import ShoalConfig, whole


class Plain:
    def __init__(self, config: dict[str, Any], handle: Any = None, *, listens: bool = False) -> None:
        pass


class Ingress(Plain):
    def __serve_build_asgi_app__(self) -> None:
        pass


def chain(config: ShoalConfig) -> list[tuple[Any, tuple[Any, ...]]]:
    """Gateway, decode, prefill as deployed: (deployment, what it is given)."""
    found = []
    application = bind(config, Replicas(Ingress, Plain, Plain))
    while application is not None:
        bound = application._bound_deployment
        found.append((bound, bound.init_args))
        application = next((each for each in bound.init_args if hasattr(each, "_bound_deployment")), None)
    return found


def test_gateway_calls_decode_and_decode_calls_prefill():
    assert [deployment.name for deployment, _ in chain(ShoalConfig())] == ["gateway", "decode", "prefill"]


def test_each_replica_gets_the_whole_configuration_as_plain_data():
    config = ShoalConfig(decode={"max_sequences": 3}, handoff={"ttl_s": 2})
    for _, arguments in chain(config):
        assert ShoalConfig(**arguments[0]) == config


def test_a_pool_that_grows_leaves_its_replicas_as_they_are():
    small, large = (chain(ShoalConfig(decode={"replicas": number})) for number in (1, 3))
    assert [arguments[0] for _, arguments in small] == [arguments[0] for _, arguments in large]
    assert [one.num_replicas for one, _ in large] == [1, 3, 1]


def test_prefill_replicas_are_chosen_by_the_router_that_heeds_exclusions():
    _, decode, prefill = (one for one, _ in chain(ShoalConfig()))
    assert router_of(prefill) == "shoal.cluster.router.GrantRouter" != router_of(decode)


@pytest.mark.parametrize(
    ("pool", "ray", "expected"),
    [
        ({}, {}, 32),
        ({"max_sequences": 6}, {}, 3),
        ({"pack_up_to": 5}, {}, 5),
        ({"pack_up_to": 5}, {"address": "auto"}, 5),
        ({"pack_up_to": 0}, {}, 0),
        ({}, {"address": "auto"}, 0),
        ({"num_gpus": 1}, {}, 0),
        ({"device": "cuda"}, {}, 0),
        ({"num_threads": 3}, {}, 0),
        ({"num_threads": 4}, {}, 32),
    ],
)
def test_replicas_are_filled_one_after_the_other_where_each_has_all_cores(
    pool: dict[str, Any], ray: dict[str, Any], expected: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(whole, "usable_threads", lambda: 4)
    assert (config := ShoalConfig(decode=pool, ray=ray)).packs_up_to(config.decode) == expected
    deployment = chain(ShoalConfig(prefill=pool, ray=ray))[2][0]
    assert deployment._deployment_config.request_router_config.request_router_kwargs == {"pack_up_to": expected}


def router_of(deployment: Any) -> str:
    found: str = deployment._deployment_config.request_router_config.request_router_class
    return found


def test_the_pools_lie_on_resources_of_their_own():
    _, decode, prefill = (one for one, _ in chain(ShoalConfig(decode={"replicas": 3, "num_gpus": 0.5})))
    assert decode.ray_actor_options["resources"] == {"decode": 1}
    assert prefill.ray_actor_options["resources"] == {"prefill": 1}
    assert (decode.num_replicas, prefill.num_replicas) == (3, 1)
    assert (decode.ray_actor_options["num_gpus"], prefill.ray_actor_options["num_gpus"]) == (0.5, 0)


def variables(config: ShoalConfig) -> dict[str, str]:
    _, (decode, _), _ = chain(config)
    found: dict[str, str] = decode.ray_actor_options["runtime_env"]["env_vars"]
    return found


def test_waiting_threads_leave_the_cores_to_the_other_pool():
    assert variables(ShoalConfig())["OMP_WAIT_POLICY"] == "passive"


_MANY_LENGTHS = """
import ctypes, torch
class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (*"abcdefg", "used", "free", "top")]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Heap
torch.set_num_threads(1)
weight, inputs = torch.ones(64, 64, dtype=torch.bfloat16), torch.ones(500, 64, dtype=torch.bfloat16)
torch.nn.functional.linear(inputs, weight)
before = libc.mallinfo2().used
for rows in range(65, 465):
    torch.nn.functional.linear(inputs[:rows], weight)
print(libc.mallinfo2().used - before)
"""


def test_who_runs_it_may_have_more_or_less_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "17")
    assert variables(ShoalConfig())["LRU_CACHE_CAPACITY"] == "17"
    assert variables(ShoalConfig())["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "128"


def test_prompts_of_all_lengths_leave_no_more_than_some():
    """That torch and oneDNN read these variables at all is theirs to change."""

    def grown(environment: Mapping[str, str]) -> int:
        command = [sys.executable, "-c", _MANY_LENGTHS]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
        return int(done.stdout)

    kept = {name: value for name, value in variables(ShoalConfig()).items() if name in KEPT_PRODUCTS}
    by_itself = grown({})
    if by_itself < 16 << 20:
        pytest.skip("torch compiles no products on this processor")
    assert grown(kept) < by_itself / 2


@pytest.mark.parametrize(
    ("config", "num_threads"),
    [
        (ShoalConfig(), str(len(os.sched_getaffinity(0)))),
        (ShoalConfig(decode={"num_threads": 3}), "3"),
        (ShoalConfig(ray={"address": "auto"}, decode={"num_threads": 3}), "3"),
        (ShoalConfig(ray={"address": "auto"}), None),
    ],
    ids=["this machine's cores", "as configured", "as configured elsewhere", "the other machine's own"],
)
def test_threads_are_set_before_torch_loads(config: ShoalConfig, num_threads: str | None):
    assert variables(config).get("OMP_NUM_THREADS") == num_threads


def test_the_demand_is_what_all_replicas_need():
    config = ShoalConfig(prefill={"replicas": 2, "num_cpus": 0.5}, decode={"replicas": 3, "num_cpus": 2, "num_gpus": 1})
    assert demand(config) == {"CPU": 7, "GPU": 3, "prefill": 2, "decode": 3, "gateway": 1}


def test_on_a_cluster_that_is_joined_the_gateway_may_run_anywhere():
    assert "gateway" not in demand(ShoalConfig(ray={"address": "auto"}))


def test_the_gateway_goes_where_its_resource_is():
    config = ShoalConfig(ray={"address": "auto"}, gateway={"resource": "front"})
    gateway, _, _ = (one for one, _ in chain(config))
    assert gateway.ray_actor_options["resources"] == {"front": 1}
    assert demand(config)["front"] == 1


def test_of_a_node_little_is_asked_but_to_be_it():
    config = ShoalConfig(ray={"address": "auto"}, gateway={"resource": "node:10.0.0.1"})
    gateway, _, _ = (one for one, _ in chain(config))
    assert gateway.ray_actor_options["resources"] == {"node:10.0.0.1": 0.001}


def test_the_gateway_listens_unless_serve_s_proxy_does():
    own = bind(ShoalConfig(), Replicas(Ingress, Plain, Plain))
    assert own._bound_deployment.init_kwargs == {"listens": True}
    assert own._bound_deployment.func_or_class is Ingress
    proxied = build({})
    assert proxied._bound_deployment.init_kwargs == {"listens": False}


def test_another_port_changes_nothing_else():
    config = ShoalConfig(gateway={"grpc_port": 0}, decode={"replicas": 3})
    changed = with_gateway(config, port=1234)
    assert changed.gateway.port == 1234
    assert with_gateway(changed, port=config.gateway.port) == config


def test_a_serve_configuration_file_joins_the_cluster_that_it_is_deployed_on():
    gateway = build({"gateway": {"resource": "gateway"}})
    assert ShoalConfig(**gateway._bound_deployment.init_args[0]).ray.address == "auto"
    named = build({"ray": {"address": "10.0.0.1:6379"}})
    assert ShoalConfig(**named._bound_deployment.init_args[0]).ray.address == "10.0.0.1:6379"


def test_serve_asks_each_replica_so_often_that_one_that_hangs_is_replaced_within_seconds():
    for deployment, _ in chain(ShoalConfig()):
        asked = deployment._deployment_config
        # Three bad answers, or three that don't come.
        assert 3 * asked.health_check_period_s < 5 and 3 * asked.health_check_timeout_s < 20
