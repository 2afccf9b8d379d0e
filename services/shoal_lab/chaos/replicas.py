"""The replicas that chaos deploys: those that are shipped, with the switchboard in reach.

Prefill reaches decode by the proxy's address and through a faulty channel; the wall clock is wrong when it's told to;
and one that starts while the disk is full finds it so.
"""

from __future__ import annotations

import functools
import random
import time
from types import SimpleNamespace
from typing import Any

from grpc._cython import cygrpc
from ray.serve.handle import DeploymentHandle

from shoal.cluster import Replicas
from shoal.cluster.decode_replica import DecodeReplica
from shoal.cluster.gateway_replica import GatewayReplica
from shoal.cluster.prefill_replica import PrefillReplica
from shoal.handoff.base import Channel
from shoal.handoff.channels.grpc import dial
from shoal.wire.peers import PeerTls
from shoal_lab.chaos.channel import FaultyChannel
from shoal_lab.chaos.disk import limit_files
from shoal_lab.chaos.proxy import DECODE_HOST, PROXY_HOST
from shoal_lab.chaos.switchboard import Switchboard


class ChaosGateway(GatewayReplica):
    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: dict[str, Any], decode: DeploymentHandle[Any], *, listens: bool
    ) -> None:
        join_chaos()
        await super().__init__(config, decode, listens=listens)


class ChaosDecode(DecodeReplica):
    async def __init__(self, config: dict[str, Any], prefill: DeploymentHandle[Any]) -> None:  # type: ignore[misc]
        join_chaos()
        await super().__init__(config, prefill)


class ChaosPrefill(PrefillReplica):
    async def __init__(self, config: dict[str, Any]) -> None:  # type: ignore[misc]
        switchboard = join_chaos()
        self.dial = functools.partial(dial_proxy, switchboard)
        await super().__init__(config)


REPLICAS = Replicas(ChaosGateway, ChaosDecode, ChaosPrefill)


async def dial_proxy(switchboard: Switchboard, address: str, tls: PeerTls | None = None) -> Channel:
    """To decode at ``address``, by way of the proxy."""
    channel = await dial(address.replace(DECODE_HOST, PROXY_HOST), tls)
    return FaultyChannel(channel, switchboard, random.Random(address))


def join_chaos() -> Switchboard:
    """Let this process suffer."""
    switchboard = Switchboard.of_this_process()
    right = time.time
    # gRPC's Python compares with the clock of its native half, which is the host's and can't be moved for one process.
    cygrpc.time = SimpleNamespace(time=right)
    time.time = lambda: right() + switchboard.clock_offset_s
    if switchboard.disk_is_full:
        limit_files(0, is_full=True)
    return switchboard
