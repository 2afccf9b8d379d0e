"""The decode pool's Ray Serve deployment: one process, one replica."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack, aclosing
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from shoal.cluster import directory, routes
from shoal.cluster.replica import (
    host_of_handoff,
    host_of_metrics,
    known_error,
    leave_no_dump,
    peer_tls,
)
from shoal.cluster.watch import Watch
from shoal.config import ShoalConfig
from shoal.errors import PeerGone
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
from shoal.wire.messages import GenerateRequest
from shoal.wire.ports import join_address
from shoal.wire.probe import ProbedServer
from shoal.wire.token_server import Outlet, TokenServer

if TYPE_CHECKING:
    from shoal.handoff.server import HandoffServer

# How long Serve's call waits for the claim. A replica that has room for the prompt claims within some milliseconds; of
# a prompt that must wait for room Serve is to know no later than that.
_CLAIM_PATIENCE_S = 0.02


class DecodeReplica:
    """Answers what gateways bring by gRPC; calls prefill replicas through ``prefill``, Serve's handle of them."""

    async def __init__(self, config: dict[str, Any], prefill: DeploymentHandle[Any]) -> None:  # type: ignore[misc]
        # Here and not above: who deploys this class needs neither torch nor the seconds that it takes.
        from shoal.decode.stage import open_decode

        settings = ShoalConfig(**config)
        configure_logging(settings.log.level, settings.log.format, error_text=settings.log.error_text)
        leave_no_dump()
        self._prefill: Any = prefill
        self._is_stopping = False
        self._stop_timeout_s = settings.ray.stop_timeout_s
        self._exits = AsyncExitStack()
        registry = new_registry()
        host = host_of_metrics(settings)
        ports = settings.metrics.port_range
        metrics = serve_metrics(registry, host.bound, ports.first, ports.last)
        self._exits.callback(metrics.close)
        peers = host_of_handoff(settings)
        tls = peer_tls(settings, "decode", CertificateMetrics(registry))
        self._tokens = TokenServer(self._answer)
        pool = ServePrefillPool(settings.ray.app_name, prefill)
        self._stage = await self._exits.enter_async_context(
            open_decode(
                settings,
                registry,
                pool,
                num_replicas=directory.num_replicas(),
                on_progress=_report_loading,
            )
        )
        ports = settings.handoff.port_range
        address = await self._stage.server.listen(
            peers.bound,
            ports.first,
            ports.last,
            advertised_host=peers.advertised,
            tls=tls,
            also=self._tokens.add_to,
        )
        own_address = join_address(peers.own, int(address.rpartition(":")[2]))
        probed = ProbedServer(self._stage.server, own_address, tls)
        self._exits.push_async_callback(probed.close)
        self._exits.callback(self._tokens.close)  # before the server, which would wait for its streams
        self._entry = directory.entry_of_this_replica(
            "decode",
            metrics_address=join_address(host.advertised, metrics.port),
            handoff_address=address,
            key=self._tokens.server_id.hex(),
        )
        pool.server = self._stage.server
        self._watch = Watch(
            self._stage.heartbeats,
            {
                Component.METRICS_SERVER: metrics,
                Component.ENGINE: self._stage.engine,
                Component.HANDOFF_SERVER: probed,
            },
            limit_s=settings.ray.stall_timeout_s,
            metrics=HealthMetrics(registry),
            publish=partial(directory.publish_health, self._entry),
            is_stopping=lambda: self._is_stopping,
        )
        await asyncio.to_thread(directory.register, self._entry)
        self._watch.start()

    async def _answer(self, request: GenerateRequest, outlet: Outlet) -> None:
        """What a gateway has brought; to cancel it frees everything on both pools."""
        self._watch.require_healthy()
        with bind_request(request.context.request_id, request.context.traceparent):
            async with aclosing(self._stage.worker.generate(request)) as outputs:
                async for output in outputs:
                    outlet.send(output)

    async def describe(self) -> dict[str, Any]:
        """What this live replica holds: for operators, the demo and the tests."""
        stage = self._stage
        return {
            "pid": os.getpid(),
            "num_layers": stage.served.plan.num_layers,
            "layers": [0, stage.served.plan.num_layers],
            "parameter_bytes": stage.parameter_bytes,
            "plan_hash": stage.served.plan_hash,
            "prefill": await self._prefill.describe.remote(),
        }

    async def check_health(self) -> None:
        """Raises, and Serve replaces this replica, once one of its threads or servers doesn't work."""
        self._watch.require_healthy()

    async def __del__(self) -> None:
        """Serve stops this replica: it gets no more work, finishes what it has, and closes."""
        if hasattr(self, "_watch"):
            self._is_stopping = True  # which the watch publishes
            await self._tokens.drain(self._stop_timeout_s)
            await self._watch.close()
            await asyncio.to_thread(directory.unregister, self._entry)
        await self._exits.aclose()


class ServePrefillPool:
    """The prefill pool through its Serve handle; and, where prefill has opened a session to ``server``, by that first.

    Serve takes milliseconds to bring a call to its replica, and of the cores of both processes as much. The call is
    there to be counted, so it may come after the claim, when prefill computes.
    """

    def __init__(self, app_name: str, handle: DeploymentHandle[Any]) -> None:
        self.server: HandoffServer | None = None
        self._living = directory.LivingPool(app_name, "prefill")
        self._handle: Any = handle
        self._granted: WeakKeyDictionary[Grant, tuple[str, bytes]] = WeakKeyDictionary()

    async def living(self, *, now: bool = False) -> frozenset[str]:
        return await self._living.ids(now=now)

    @property
    def unfit(self) -> frozenset[str]:
        return self._living.unfit

    def asked(self, grant: Grant) -> str | None:
        granted, granted_key = self._granted.get(grant, (None, b""))
        # Wherever Serve has brought the call: who has claimed the prompt answers for it. (Of one that hangs or is gone
        # the living know no key any more.)
        if self.server is not None and (key := self.server.claimant(grant.lease_id)):
            return granted if key == granted_key else self._living.with_key(key)
        return routes.replica_of(grant) or granted

    async def ask(self, grant: Grant) -> HandoffOutcome:
        call: Any = None
        try:
            replica_id = routes.pick(grant)
            if self.server is not None and replica_id is not None:
                key = self._living.key_of(replica_id)
                self._granted[grant] = (replica_id, key)  # from now on, what goes wrong is its doing
                if await self.server.grant(grant, key, _CLAIM_PATIENCE_S) is None:
                    del self._granted[grant]
            call = self._handle.prefill.remote(grant)
            outcome: HandoffOutcome = await call
        except asyncio.CancelledError as error:
            if call is not None:
                call.cancel()
            task = asyncio.current_task()
            if task is not None and not task.cancelling():  # nobody here wanted that: Ray did
                raise PeerGone("the prefill replica went away: its call was cancelled") from error
            raise
        except (RayError, RayServeException) as error:
            raise known_error(error, "prefill") from error
        finally:
            routes.ended(grant)
        return outcome


def _report_loading(num_done: int, num_total: int) -> None:
    directory.report_loading("decode", num_done, num_total)
