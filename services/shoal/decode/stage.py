"""A whole decode stage of one process: model, engine, hand-off desk and server; opened and given back as one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cache, partial

import structlog
import torch
from prometheus_client import CollectorRegistry

from shoal.config import HandoffConfig, ShoalConfig
from shoal.decode.neighbours import Neighbours
from shoal.decode.prefill_pool import PrefillPool
from shoal.decode.sink import PoolSink, Project
from shoal.decode.worker import DecodeWorker
from shoal.decode.yielding import yield_s_of
from shoal.engine.build import Served, layout_of, load_stage
from shoal.engine.client import EngineClient
from shoal.engine.detokenizer import decode_with
from shoal.engine.engine import Engine
from shoal.engine.events import EngineCounts, StepOutput
from shoal.engine.meter import StepMeter
from shoal.engine.yielding import Yielding
from shoal.handoff.base import new_incarnation
from shoal.handoff.carriers.nixl.process import Nixl, nixl_for
from shoal.handoff.carriers.shm import ShmUnloader
from shoal.handoff.decode_session import Attach
from shoal.handoff.decode_side import HandoffDesk
from shoal.handoff.lease_table import LeaseTimes
from shoal.handoff.server import HandoffServer
from shoal.handoff.session import Identity
from shoal.handoff.terms import KvShape
from shoal.model.parameters import Parameters
from shoal.model.rope import Rope
from shoal.process.heartbeat import Heartbeat
from shoal.process.machine import usable_threads
from shoal.telemetry import DecodeMetrics, TransferMetrics, Transport
from shoal.wire.handoff_messages import WireMode
from shoal.wire.messages import Stage

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class DecodeStage:
    """``server`` is where prefill brings K/V: over gRPC once it listens, or within this process."""

    served: Served
    worker: DecodeWorker
    engine: EngineClient
    desk: HandoffDesk
    server: HandoffServer
    parameter_bytes: int
    registry: CollectorRegistry
    heartbeats: tuple[Heartbeat, ...]
    """Of all its threads."""

    async def counts(self) -> EngineCounts:
        return await self.engine.call(Engine.counts)


@asynccontextmanager
async def open_decode(
    config: ShoalConfig,
    registry: CollectorRegistry,
    prefill: PrefillPool | None,
    *,
    transport: Transport = Transport.GRPC,
    num_replicas: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> AsyncIterator[DecodeStage]:
    """Load the whole model and be ready for requests; on leaving, open leases get ``handoff.drain_s`` to finish.

    ``num_replicas`` of decode are there, this one included."""
    async with AsyncExitStack() as exits:
        transfer_metrics = TransferMetrics(registry, transport)
        handoff = config.handoff
        nixl = nixl_for(
            handoff.carrier, handoff.max_retired_bytes, transfer_metrics.retired, is_encrypted=config.has_peer_tls
        )
        if nixl is not None:
            exits.push_async_callback(nixl.close)
        loaded = await load_stage(config, Stage.DECODE, on_progress)
        served, parameters, core = loaded.served, loaded.parameters, loaded.engine
        if served.plan.anchors is not None:
            _log.warning("the speed plan is for checkpoints tuned for it: any other one loses much more than with pop")
        metrics = DecodeMetrics(registry)
        metrics.parameters(
            held_bytes=loaded.num_bytes, full_model_bytes=served.spec.num_parameters * served.dtype.itemsize
        )
        meter = StepMeter(metrics)

        worker: DecodeWorker | None = None

        def on_step(output: StepOutput) -> None:
            meter(output)
            if output.num_rows:
                metrics.step(output.ended_s - output.started_s, output.num_sequences)
            for num_bytes in output.finished_kv_bytes:
                metrics.held(num_bytes)
            if worker is not None:  # the first output may come before it, or all that follows have failed
                worker.told_of_blocks(wanted=output.wants_blocks)

        device = core.runner.pool.layers[0].device
        pause_s = choose_yield_s(config, num_replicas, device)
        neighbours = Neighbours.of_this_process() if pause_s and shares_cores(config, device) else None
        if neighbours is not None:
            exits.callback(neighbours.close)
        engine = EngineClient(
            core,
            name="shoal-decode",
            on_step=on_step,
            niceness=loaded.niceness,
            yielding=Yielding(pause_s, bool if neighbours is None else neighbours.are_on_their_way),
            stream_interval=config.decode.stream_interval,
        )
        exits.callback(engine.close)
        wire_modes = _wire_modes(config, served)
        project = _projection(served, parameters) if WireMode.HIDDEN in wire_modes else None
        sink = PoolSink(core.runner.pool, project, loaded.copier)
        exits.callback(sink.close)
        desk = HandoffDesk(
            sink,
            _kv_shape(served),
            times=LeaseTimes(config.handoff.claim_timeout_s, config.handoff.ttl_s),
            credit_bytes=config.handoff.credit_bytes,
            observer=transfer_metrics,
        )
        server = HandoffServer(
            desk,
            Identity(new_incarnation(), (served.plan_hash,), wire_modes, peer="decode"),
            attach=_attach(config.handoff, nixl),
        )
        exits.push_async_callback(server.drain, handoff.drain_s)
        worker = DecodeWorker(
            engine,
            desk,
            plan=served.plan,
            plan_hash=served.plan_hash,
            config=config.handoff,
            decode_text=decode_with(served.files.backend_tokenizer()),
            prefill=prefill,
            metrics=metrics,
            prefill_remembers=config.prefill.reuse != "none",
            stream_interval=config.decode.stream_interval,
        )
        heartbeats = (engine.heartbeat, sink.heartbeat, *(() if nixl is None else (nixl.heartbeat,)))
        yield DecodeStage(served, worker, engine, desk, server, loaded.num_bytes, registry, heartbeats)


def _attach(config: HandoffConfig, nixl: Nixl | None) -> Attach:
    return Attach(
        ShmUnloader.attach if config.carrier in {"auto", "shm"} else None,
        None if nixl is None else partial(nixl.attach, deadline_s=config.ttl_s),
    )


def _kv_shape(served: Served) -> KvShape:
    token_layer_bytes = layout_of(served, Stage.DECODE, block_tokens=1).token_layer_bytes
    state_bytes = layout_of(served, Stage.PREFILL, block_tokens=1).state_bytes
    plan = served.plan
    return KvShape(served.plan_hash, plan.num_shipped_layers, plan.num_kept, token_layer_bytes, state_bytes)


def _wire_modes(config: ShoalConfig, served: Served) -> tuple[WireMode, ...]:
    """What prefill may ship for the skipped layers: K/V alone where nothing is projected."""
    if not served.plan.projects:
        return (WireMode.KV,)
    return tuple(WireMode) if config.handoff.wire_mode == "auto" else (WireMode(config.handoff.wire_mode),)


def _projection(served: Served, parameters: Parameters) -> Project | None:
    """By torch: Shoal's own kernels are the engine's, whose steps must not wait for a copy."""
    if parameters.projection is None:
        return None
    # In the thread that copies, when the first states come: it has its own way to compute alone.
    unpacked = cache(parameters.projection.unpacked)

    def project(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        rope = Rope.at(served.spec, positions, served.dtype)
        return unpacked()(states.to(served.dtype), rope)

    return project


def choose_yield_s(config: ShoalConfig, num_replicas: int, device: torch.device) -> float:
    """As configured; else none, unless both pools share cores."""
    if config.handoff.yield_s is not None:
        return config.handoff.yield_s
    if not shares_cores(config, device):
        return 0.0
    return yield_s_of(1 if config.packs_up_to(config.decode) else num_replicas)


def shares_cores(config: ShoalConfig, device: torch.device) -> bool:
    """Whether both pools want the same cores of one machine."""
    pools = (config.prefill, config.decode)
    is_one_machine = config.ray.address is None and device.type == "cpu"
    are_on_cpu = all(pool.device in ("auto", "cpu") and not pool.num_gpus for pool in pools)
    want_too_many = sum(pool.num_threads or usable_threads() for pool in pools) > usable_threads()
    return is_one_machine and are_on_cpu and want_too_many
