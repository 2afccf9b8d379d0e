"""The real replicas, with a method each that makes one of their threads hang. For tests alone: nothing ships it."""

from __future__ import annotations

import asyncio
import threading
import time

from shoal.cluster import Replicas
from shoal.cluster.decode_replica import DecodeReplica
from shoal.cluster.gateway_replica import GatewayReplica
from shoal.cluster.prefill_replica import PrefillReplica


class WedgedDecode(DecodeReplica):
    async def wedge_engine(self) -> str:
        """Returns which replica this is when the thread hangs, in what it does between two steps."""
        hangs = threading.Event()
        self._stage.engine.post(lambda _engine: (hangs.set(), threading.Event().wait()))  # type: ignore[arg-type, func-returns-value]
        assert await asyncio.to_thread(hangs.wait, 10)
        return self._entry.replica_id


class WedgedPrefill(PrefillReplica):
    async def wedge_loop(self) -> None:
        """Never returns."""
        while True:
            time.sleep(3600)  # noqa: ASYNC251 - that is what is wrong with it


def wedged() -> Replicas:
    return Replicas(GatewayReplica, WedgedDecode, WedgedPrefill)
