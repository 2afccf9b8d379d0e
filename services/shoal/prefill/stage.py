"""A whole prefill stage of one process: model, engine, sessions, metrics; opened and given back as one."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

import structlog
from prometheus_client import CollectorRegistry

from shoal.backends.cpu.copying import Copier
from shoal.config import HandoffConfig, ShoalConfig
from shoal.engine.build import Served, load_stage
from shoal.engine.client import EngineClient
from shoal.engine.engine import Engine
from shoal.engine.events import EngineCounts, StepOutput
from shoal.engine.meter import StepMeter
from shoal.errors import ConfigError
from shoal.handoff.base import Channel, new_incarnation
from shoal.handoff.carriers.nixl.process import Nixl, nixl_for
from shoal.handoff.carriers.shm import ShmLoader, reap
from shoal.handoff.channels.grpc import dial
from shoal.handoff.offer import Staging
from shoal.handoff.prefill_side import PrefillSession
from shoal.handoff.session import Identity
from shoal.handoff.session_pool import SessionPool
from shoal.model.kv_layout import KvLayout
from shoal.prefill.worker import PrefillWorker
from shoal.process.heartbeat import Heartbeat
from shoal.telemetry import PrefillMetrics
from shoal.wire.frames import KEY_BYTES
from shoal.wire.handoff_messages import WireMode
from shoal.wire.messages import Stage

Connect = Callable[[str], Awaitable[Channel]]

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PrefillStage:
    """``parameter_bytes`` is what this process really holds, ``parameter_names`` of which tensors. Who knows ``key``
    may grant prompts by the sessions."""

    served: Served
    worker: PrefillWorker
    sessions: SessionPool
    key: bytes
    engine: EngineClient
    parameter_bytes: int
    full_model_bytes: int
    parameter_names: tuple[str, ...]
    registry: CollectorRegistry
    heartbeats: tuple[Heartbeat, ...]
    """Of all its threads."""

    async def counts(self) -> EngineCounts:
        return await self.engine.call(Engine.counts)


@asynccontextmanager
async def open_prefill(
    config: ShoalConfig,
    registry: CollectorRegistry,
    *,
    connect: Connect = dial,
    on_progress: Callable[[int, int], None] | None = None,
) -> AsyncIterator[PrefillStage]:
    """Load the kept layers and be ready for grants; on leaving, open leases get ``handoff.drain_s`` to finish."""
    async with AsyncExitStack() as exits:
        nixl = nixl_for(config.handoff.carrier, is_encrypted=config.has_peer_tls)
        if nixl is not None:
            exits.push_async_callback(nixl.close)
        loaded = await load_stage(config, Stage.PREFILL, on_progress)
        served, parameters, core = loaded.served, loaded.parameters, loaded.engine
        layout = core.scheduler.layout
        _require_room(config.handoff, layout)
        metrics = PrefillMetrics(registry)
        full_model_bytes = served.spec.num_parameters * served.dtype.itemsize
        metrics.parameters(held_bytes=parameters.num_bytes, full_model_bytes=full_model_bytes)
        on_step = _on_step(metrics, layout.block_bytes)
        engine = EngineClient(core, name="shoal-prefill", on_step=on_step, niceness=loaded.niceness)
        exits.callback(engine.close)
        key = secrets.token_bytes(KEY_BYTES)
        wire_modes = (WireMode.KV, WireMode.HIDDEN) if served.plan.projects else (WireMode.KV,)
        sessions = SessionPool(
            connect,
            Identity(new_incarnation(), (served.plan_hash,), wire_modes, peer="prefill", key=key),
            ttl_s=config.handoff.ttl_s,
            max_frame_bytes=config.handoff.max_frame_bytes,
            staging=_staging(config.handoff, nixl, loaded.copier),
            opened=partial(_session_opened, metrics, config.handoff.carrier),
        )
        worker = PrefillWorker(engine, sessions, plan=served.plan, plan_hash=served.plan_hash, metrics=metrics)
        sessions.granted = worker.begin
        names = tuple(name for name, _ in parameters.tensors())
        exits.push_async_callback(worker.close)
        exits.push_async_callback(sessions.drain, config.handoff.drain_s)
        heartbeats = (engine.heartbeat, *(() if nixl is None else (nixl.heartbeat,)))
        yield PrefillStage(
            served, worker, sessions, key, engine, parameters.num_bytes, full_model_bytes, names, registry, heartbeats
        )


def _require_room(config: HandoffConfig, layout: KvLayout) -> None:
    """Raises ConfigError where a frame, or a slot, doesn't hold what can't be cut."""
    least_bytes = max(layout.token_layer_bytes, layout.state_bytes)
    for limit in ("max_frame_bytes", "slot_bytes"):
        if getattr(config, limit) < least_bytes:
            raise ConfigError(
                f"handoff.{limit} is {getattr(config, limit)}, but one token's K/V in one layer, or its state, are "
                f"{least_bytes} bytes: raise it"
            )


def _staging(config: HandoffConfig, nixl: Nixl | None, copier: Copier) -> Staging:
    sizes = (config.slot_bytes, config.staging_bytes)
    remote = None if nixl is None else partial(nixl.open_loader, *sizes, copier=copier, linger_s=2 * config.ttl_s)
    if config.carrier not in {"auto", "shm"}:
        return Staging(remote=remote, copier=copier)
    if num_segments := reap():
        _log.info("removed staging segments of prefill processes that have died", num_segments=num_segments)
    return Staging(partial(ShmLoader.create, *sizes, copier=copier), remote, copier)


def _session_opened(metrics: PrefillMetrics, wanted: str, address: str, session: PrefillSession) -> None:
    metrics.session_opened(session.carrier, session.carrier_reason, session.wire_mode)
    say = _log.info if wanted in {"auto", session.carrier} else _log.warning
    say(
        "hand-off session opened",
        address=address,
        carrier=session.carrier,
        reason=session.carrier_reason,
        wire_mode=session.wire_mode,
    )


def _on_step(metrics: PrefillMetrics, block_bytes: int) -> Callable[[StepOutput], None]:
    meter = StepMeter(metrics)

    def on_step(output: StepOutput) -> None:
        meter(output)
        # Every block here belongs to a prompt that decode hasn't committed yet.
        metrics.pinned((output.counts.num_blocks - output.counts.num_free_blocks) * block_bytes)

    return on_step
