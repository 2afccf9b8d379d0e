"""Both stages in one process, joined by a channel in memory: ``shoal generate``, and the plainest way to test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from shoal.config import ShoalConfig
from shoal.decode.stage import DecodeStage, open_decode
from shoal.handoff.base import Channel
from shoal.prefill.stage import PrefillStage, open_prefill
from shoal.telemetry import Transport, new_registry
from shoal.wire.handoff_messages import Carrier, Grant, HandoffOutcome, WireMode

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class LocalShoal:
    """``await local.decode.worker.generate(request)`` goes through both stages."""

    prefill: PrefillStage
    decode: DecodeStage


@asynccontextmanager
async def open_local(config: ShoalConfig, on_progress: Progress | None = None) -> AsyncIterator[LocalShoal]:
    """Load both stages. ``on_progress`` is called with (stage, layers done, layers in all)."""

    # Within a process, a payload in a frame isn't copied at all, so that fewer bytes win nothing.
    wire_mode = WireMode.KV.value if config.handoff.wire_mode == "auto" else config.handoff.wire_mode
    handoff = config.handoff.model_copy(update={"carrier": Carrier.INLINE.value, "wire_mode": wire_mode})
    # A GPU is both stages': each takes its share of half of it.
    pools = {
        name: pool.model_copy(update={"num_gpus": min(1.0, pool.num_gpus) / 2})
        for name, pool in (("prefill", config.prefill), ("decode", config.decode))
    }
    config = config.model_copy(update={"handoff": handoff, **pools})

    async def connect(_address: str) -> Channel:
        return await decode.server.connect()

    def told(stage: str) -> Callable[[int, int], None] | None:
        return None if on_progress is None else lambda done, total: on_progress(stage, done, total)

    async with open_decode(
        config, new_registry(), None, transport=Transport.MEMORY, num_replicas=1, on_progress=told("decode")
    ) as decode:
        decode.desk.address = "memory"
        async with open_prefill(config, new_registry(), connect=connect, on_progress=told("prefill")) as prefill:
            decode.worker.prefill = OneReplica(prefill)
            yield LocalShoal(prefill, decode)


class OneReplica:
    """A prefill pool of the one stage beside us."""

    ID = "prefill"
    unfit: frozenset[str] = frozenset()

    def __init__(self, stage: PrefillStage) -> None:
        self._stage = stage

    async def living(self, *, now: bool = False) -> frozenset[str]:
        return frozenset({self.ID})

    async def ask(self, grant: Grant) -> HandoffOutcome:
        return await self._stage.worker.prefill(grant)

    def asked(self, _grant: Grant) -> str:
        return self.ID
