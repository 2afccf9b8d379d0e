"""From a configuration to the graph of deployments: gateway -> decode -> prefill.

Each deployment gets ``ShoalConfig`` as a plain dict, and the handle of the one that it calls.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shoal.config import ShoalConfig, StageConfig, load_config
from shoal.process.machine import usable_threads

if TYPE_CHECKING:
    from ray.serve import Application, Deployment

# Each pool bounds its own queue and says Overloaded at once. Serve's limit would make calls wait in the caller, where
# nobody counts them, so it must never be the one that is reached.
MAX_ONGOING_REQUESTS = 1_000_000
# Ray names a node by its address, as a resource of which there is 1: a little of it says "there".
NODE_PREFIX = "node:"
_THERE = 0.001
# Serve asks each replica so often, and replaces it when three answers in a row were bad, or took so long. The replica
# itself looks more often (watch.py), so that an answer is there at once; but on a machine that has too much to do, one
# that is well may be late with it.
HEALTH_PERIOD_S = 1.0
HEALTH_TIMEOUT_S = 5.0
# What a replica may need, beyond what its open requests may, to close its servers and its engine.
CLOSE_S = 2.0
# oneDNN, and torch's layer above it, compile products for each number of rows that comes, and keep a thousand each:
# with prompts of all lengths that is 0.6 GiB and more, filled within an hour. These are of some twenty lengths.
# Of torch's attention by blocks (backends/attention.py) prompts share all but what is at their ends.
KEPT_PRODUCTS = dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), "128")


@dataclass(frozen=True, slots=True)
class Replicas:
    """The three classes that serve.

    ``gateway(config, decode, listens=…)`` serves HTTP itself, or has Serve do it with the application that
    ``__serve_build_asgi_app__`` returns; its ``async def drain`` refuses new requests and returns when none is open;
    ``decode(config, prefill)``; ``prefill(config)``. Each may have ``async def check_health`` (an exception has the
    replica replaced) and ``async def __del__`` (runs before the process ends, once no call through Serve is open).
    """

    gateway: type
    decode: type
    prefill: type

    @classmethod
    def shipped(cls) -> Replicas:
        from shoal.cluster.decode_replica import DecodeReplica
        from shoal.cluster.gateway_replica import GatewayReplica
        from shoal.cluster.prefill_replica import PrefillReplica

        return cls(GatewayReplica, DecodeReplica, PrefillReplica)


def build(config: ShoalConfig | Mapping[str, Any]) -> Application:
    """The application, bound but not deployed. A Ray Serve config file may name it as ``shoal.cluster:build``.

    HTTP then comes by Serve's proxy, whose address that file says.
    """
    if not isinstance(config, ShoalConfig):
        # Whoever deploys a file does it on a cluster that is there already.
        config = load_config(**_joining(config))
    return bind(config, Replicas.shipped(), proxied=True)


def _joining(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**config, "ray": {"address": "auto", **config.get("ray", {})}}


def bind(config: ShoalConfig, replicas: Replicas, *, proxied: bool = False) -> Application:
    """The graph; with ``proxied``, clients come in by Serve's proxy rather than by the gateway's own HTTP server."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from shoal.cluster.router import GRANTS

    # What a pool's size is, is no replica's business: were it told, all would restart when one is added.
    plain = config.model_dump(mode="json", exclude={"prefill": {"replicas"}, "decode": {"replicas"}})
    router = RequestRouterConfig(
        request_router_class=GRANTS,  # type: ignore[arg-type]
        request_router_kwargs={"pack_up_to": config.packs_up_to(config.prefill)},
    )
    routed = {"request_router_config": router}
    prefill = _deployment(replicas.prefill, "prefill", config, _of_stage("prefill", config, config.prefill) | routed)
    decode = _deployment(replicas.decode, "decode", config, _of_stage("decode", config, config.decode))
    gateway = _deployment(
        serve.ingress()(replicas.gateway) if proxied else replicas.gateway,
        "gateway",
        config,
        {"ray_actor_options": {"num_cpus": config.gateway.num_cpus, "resources": _gateway_resource(config)}},
    )
    return gateway.bind(plain, decode.bind(plain, prefill.bind(plain)), listens=not proxied)


def demand(config: ShoalConfig) -> dict[str, float]:
    """What Ray must have in all, as its resource names: CPU, GPU, prefill, decode, gateway."""
    stages = (config.prefill, config.decode)
    wanted = {
        "CPU": config.gateway.num_cpus + sum(stage.replicas * stage.num_cpus for stage in stages),
        "GPU": sum(stage.replicas * stage.num_gpus for stage in stages),
        "prefill": float(config.prefill.replicas),
        "decode": float(config.decode.replicas),
        **_gateway_resource(config),
    }
    return {name: amount for name, amount in wanted.items() if amount > 0}


def num_replicas(config: ShoalConfig) -> int:
    """Processes in all, the gateway included."""
    return 1 + config.prefill.replicas + config.decode.replicas


def with_gateway(config: ShoalConfig, **changes: Any) -> ShoalConfig:
    """The same configuration, with another port or place for the gateway."""
    return config.model_copy(update={"gateway": config.gateway.model_copy(update=changes)})


def is_private(config: ShoalConfig) -> bool:
    """A cluster of this machine and this process alone, rather than one that is joined."""
    return config.ray.address is None


def grace_s(config: ShoalConfig) -> float:
    """How long all may take to end: open requests may finish, then hand-offs drain, and processes close."""
    return 2 * config.handoff.drain_s + CLOSE_S


def stop_s(config: ShoalConfig) -> float:
    """How long one replica that is stopped may take: answers may finish, then it drains its hand-offs and closes."""
    return config.ray.stop_timeout_s + config.handoff.drain_s + CLOSE_S


def _deployment(cls: type, name: str, config: ShoalConfig, options: dict[str, Any]) -> Deployment:
    from ray import serve

    return serve.deployment(
        name=name,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=stop_s(config),
        graceful_shutdown_wait_loop_s=0.05,
        # On a machine of one's own, what failed once fails again; elsewhere a host may just have gone away.
        max_constructor_retry_count=1 if is_private(config) else 3,
        **options,
    )(cls)


def _of_stage(name: str, config: ShoalConfig, stage: StageConfig) -> dict[str, Any]:
    return {
        "num_replicas": stage.replicas,
        "ray_actor_options": {
            "num_cpus": stage.num_cpus,
            "num_gpus": stage.num_gpus,
            "resources": {name: 1},
            "runtime_env": {"env_vars": _environment(config, stage)},
        },
    }


def _gateway_resource(config: ShoalConfig) -> dict[str, float]:
    # On a cluster that is joined there need be no node for it: without a resource, the gateway may run anywhere.
    name = config.gateway.resource or ("gateway" if is_private(config) else None)
    if name is None:
        return {}
    return {name: _THERE if name.startswith(NODE_PREFIX) else 1.0}


def _environment(config: ShoalConfig, stage: StageConfig) -> dict[str, str]:
    """Variables that count only if they are there before torch loads."""
    # The two pools of one machine take turns on its cores; OpenMP's spinning threads would starve the other one. Some
    # microseconds of it bridge the gaps within a step, where waking a thread takes as long as a product of few rows.
    variables = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "5000", "TOKENIZERS_PARALLELISM": "false"}
    variables |= {name: os.environ.get(name, kept) for name, kept in KEPT_PRODUCTS.items()}
    num_threads = stage.num_threads or (usable_threads() if is_private(config) else None)
    if num_threads is not None:
        # Ray sets 1 where num_cpus is 1 or less.
        variables["OMP_NUM_THREADS"] = str(num_threads)
    return variables
