"""The prefill pool's Ray Serve deployment: one process, one replica."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any

import structlog

from shoal.cluster import directory
from shoal.cluster.replica import host_of_metrics, is_stopping, leave_no_dump, peer_tls, told_plainly
from shoal.cluster.watch import Watch
from shoal.config import ShoalConfig
from shoal.errors import PeerGone
from shoal.handoff.base import Channel
from shoal.handoff.channels.grpc import dial
from shoal.telemetry import (
    CertificateMetrics,
    Component,
    HealthMetrics,
    bind_request,
    configure_logging,
    new_registry,
    serve_metrics,
)
from shoal.wire.handoff_messages import Grant, HandoffOutcome
from shoal.wire.ports import join_address

_log = structlog.get_logger(__name__)


class PrefillReplica:
    """Called by decode replicas alone, through their Serve handle. ``dial`` is how it reaches their hand-off."""

    dial: Callable[..., Awaitable[Channel]] = staticmethod(dial)

    async def __init__(self, config: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        # Here and not above: who deploys this class needs neither torch nor the seconds that it takes.
        from shoal.prefill.stage import open_prefill

        settings = ShoalConfig(**config)
        configure_logging(settings.log.level, settings.log.format, error_text=settings.log.error_text)
        leave_no_dump()
        self._exits = AsyncExitStack()
        registry = new_registry()
        host = host_of_metrics(settings)
        ports = settings.metrics.port_range
        metrics = serve_metrics(registry, host.bound, ports.first, ports.last)
        self._exits.callback(metrics.close)
        tls = peer_tls(settings, "prefill", CertificateMetrics(registry))
        self._stage = await self._exits.enter_async_context(
            open_prefill(settings, registry, connect=partial(self.dial, tls=tls), on_progress=_report_loading)
        )
        self._entry = directory.entry_of_this_replica(
            "prefill", metrics_address=join_address(host.advertised, metrics.port), key=self._stage.key.hex()
        )
        self._watch = Watch(
            self._stage.heartbeats,
            {Component.METRICS_SERVER: metrics, Component.ENGINE: self._stage.engine},
            limit_s=settings.ray.stall_timeout_s,
            metrics=HealthMetrics(registry),
            publish=partial(directory.publish_health, self._entry),
            is_stopping=is_stopping,
        )
        self._stage.sessions.granted = self._begin
        await self._greet(settings)
        await asyncio.to_thread(directory.register, self._entry)
        self._watch.start()

    async def prefill(self, grant: Grant) -> HandoffOutcome:
        """Compute and ship one prompt; returns when its lease has ended."""
        self._watch.require_healthy()
        with told_plainly(), bind_request(grant.context.request_id):
            return await self._stage.worker.prefill(grant)

    def _begin(self, grant: Grant) -> None:
        """A decode replica asks by its session, and will call: a replica that isn't healthy refuses that."""
        with suppress(PeerGone):
            self._watch.require_healthy()
            self._stage.worker.begin(grant)

    async def describe(self) -> dict[str, Any]:
        """What this live replica holds: for operators, the demo and the tests."""
        stage = self._stage
        return {
            "pid": os.getpid(),
            "num_layers": stage.served.plan.num_layers,
            "layers": [stage.served.plan.kept.start, stage.served.plan.kept.stop],
            "parameter_bytes": stage.parameter_bytes,
            "full_model_bytes": stage.full_model_bytes,
            "parameters": list(stage.parameter_names),
            "plan_hash": stage.served.plan_hash,
        }

    async def check_health(self) -> None:
        """Raises, and Serve replaces this replica, once one of its threads or servers doesn't work."""
        self._watch.require_healthy()

    async def _greet(self, settings: ShoalConfig) -> None:
        """Know those that are there and will ask: their first prompts mustn't wait for it, nor fail where all is busy.

        Who comes later is greeted by its own first prompt."""
        decode = await asyncio.to_thread(directory.living, settings.ray.app_name, "decode")
        addresses = [entry.handoff_address for entry in decode if entry.handoff_address is not None]
        failed = await self._stage.sessions.greet(addresses, within_s=settings.handoff.ttl_s)
        for address, error in failed.items():
            _log.warning("a decode replica can't be greeted", peer=address, reason=error.code, exc_info=error)

    async def __del__(self) -> None:
        if hasattr(self, "_watch"):
            await self._watch.close()
            await asyncio.to_thread(directory.unregister, self._entry)
        await self._exits.aclose()


def _report_loading(num_done: int, num_total: int) -> None:
    directory.report_loading("prefill", num_done, num_total)
