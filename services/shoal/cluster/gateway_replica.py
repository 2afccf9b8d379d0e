"""The gateway's Ray Serve deployment: the HTTP API in front of the decode pool."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import structlog
from fastapi import FastAPI
from prometheus_client import generate_latest
from ray.serve.handle import DeploymentHandle

from shoal.api.backend import Readiness, Route
from shoal.api.draining import DrainingBackend
from shoal.api.grpc_server import GrpcServer
from shoal.api.http_app import create_app
from shoal.api.http_server import HttpServer
from shoal.api.intake import Services
from shoal.api.keys import Keyring
from shoal.api.poll import SharedPoll
from shoal.api.retrying import RetryingBackend, in_time
from shoal.api.tls import expiry, server_context
from shoal.api.tokenizer import Tokenizer
from shoal.api.validation import ServedModel
from shoal.cluster import directory
from shoal.cluster.balancer import Balancer
from shoal.cluster.replica import host_of_gateway, host_of_metrics, leave_no_dump, peer_tls
from shoal.cluster.watch import Server, Watch
from shoal.config import ShoalConfig
from shoal.config.rate import RateLimit
from shoal.decode.affinity import prefix_keys
from shoal.errors import DeadlineExceeded, Unavailable
from shoal.model.files import locate
from shoal.telemetry import (
    CertificateMetrics,
    Component,
    GatewayMetrics,
    HealthMetrics,
    MetricsServer,
    ShownTo,
    Target,
    configure_logging,
    new_registry,
    serve_metrics,
    targets_document,
)  # fmt: skip
from shoal.wire.messages import Depth, GenerateRequest, TokenOutput
from shoal.wire.peers import PeerTls
from shoal.wire.ports import join_address
from shoal.wire.token_client import TokenClient
from shoal.wire.token_server import Place

_log = structlog.get_logger(__name__)

# Decode ends a request at its deadline and says so; only if nothing is heard of it does the gateway.
_GRACE_S = 1.0


class PoolBackend:
    """The decode pool: a request is brought to the replica that ``balancer`` chooses, and answered by ``tokens``.

    Where decode remembers what it computed, prompts that begin alike go to one replica.
    """

    def __init__(
        self, settings: ShoalConfig, living: directory.LivingPool, tokens: TokenClient, balancer: Balancer
    ) -> None:
        self._decode_remembers = settings.decode.reuse != "none"
        self._living = living
        self._living_prefill = directory.LivingPool(settings.ray.app_name, "prefill")
        self._tokens = tokens
        self._balancer = balancer
        self._readiness = SharedPoll(self._ask_readiness)

    async def generate(self, request: GenerateRequest, route: Route) -> AsyncGenerator[TokenOutput, None]:
        clock = asyncio.get_running_loop().time
        deadline_s = clock() + request.context.timeout_s
        living = await self._living.ids()
        if not living:
            raise Unavailable("no decode replica is ready: try again in a moment", retry_after_s=1.0)
        request = in_time(request, deadline_s - clock())
        keys = prefix_keys(request.context.tenant, request.prompt_token_ids) if self._decode_remembers else ()
        staying = frozenset(one for one in living if self._living.key_of(one) not in self._tokens.draining)
        route.replica_id = replica_id = self._balancer.choose(staying or living, keys, route.excluded)
        place = Place(self._living.key_of(replica_id), self._living.address_of(replica_id))
        with (
            self._balancer.call(replica_id, keys) as call,
            self._tokens.open(partial(self._balancer.accepted, call), partial(self._balancer.heard, call)) as stream,
        ):
            running = asyncio.create_task(stream.run(place, request))
            late = DeadlineExceeded("the request's deadline has passed")
            ending = asyncio.get_running_loop().call_at(deadline_s + _GRACE_S, stream.fail, late)
            try:
                async for output in stream:
                    yield output
                await asyncio.wait([running], timeout=_GRACE_S)  # a moment: decode has said all
            finally:
                ending.cancel()
                # However this ends: decode stops at once, and what it held on both pools is free again.
                running.cancel()

    async def living(self) -> frozenset[str]:
        return await self._living.ids()

    async def readiness(self) -> Readiness:
        """Up to a second old, however many probe or watch: Ray's head is asked no more often. While it is silent, as it
        was last: replicas serve without it."""
        return await self._readiness.answer()

    async def _ask_readiness(self) -> Readiness:
        decode, prefill = await asyncio.gather(self._living.ids(now=True), self._living_prefill.ids(now=True))
        return Readiness(num_decode=len(decode), num_prefill=len(prefill))


class GatewayReplica:
    """Validates and tokenizes once; knows no device.

    With ``listens`` it serves HTTP itself; else Serve's proxy does, and calls it for each request. Decode's handle says
    to Serve that decode is part of the application; requests go there by gRPC.
    """

    async def __init__(  # type: ignore[misc]
        self, config: dict[str, Any], _decode: DeploymentHandle[Any], *, listens: bool
    ) -> None:
        self._settings = settings = ShoalConfig(**config)
        configure_logging(settings.log.level, settings.log.format, error_text=settings.log.error_text)
        leave_no_dump()
        self._exits = AsyncExitStack()
        self._registry = new_registry()
        files = locate(settings.model.name)
        size = files.size()
        model = ServedModel(
            name=settings.model.served_name or files.model_id,
            max_context_tokens=settings.model.max_context_tokens or size.max_context_tokens,
            vocab_size=size.vocab_size,
            default_depth=Depth(settings.model.depth),
            created_s=int(time.time()),
        )
        metrics = GatewayMetrics(self._registry, [model.name])
        host = host_of_metrics(settings)
        ports = settings.metrics.port_range
        server = serve_metrics(self._registry, host.bound, ports.first, ports.last)
        self._exits.callback(server.close)
        tokenizer = Tokenizer(files.tokenizer())
        self._exits.callback(tokenizer.close)
        tokens = TokenClient(self._certificates(listens=listens))
        self._exits.push_async_callback(tokens.close)
        living = directory.LivingPool(settings.ray.app_name, "decode")
        self._backend = DrainingBackend(
            RetryingBackend(
                PoolBackend(settings, living, tokens, Balancer(settings.packs_up_to(settings.decode))),
                max_attempts=settings.handoff.max_attempts,
                limit=RateLimit(settings.gateway.retry),
                observer=metrics,
                resumes=settings.gateway.resume,
            )
        )
        self._services = Services(
            self._backend,
            tokenizer,
            (model,),
            settings.gateway,
            metrics,
            wants_outline=settings.model.plan == "speed",
            keyring=None if settings.gateway.keys_file is None else Keyring(settings.gateway.keys_file),
            require_healthy=self._require_healthy,
        )
        clients_host = host_of_gateway(settings.gateway, serves_http=listens)
        self._grpc_server: GrpcServer | None = None
        if settings.gateway.grpc_port:
            self._grpc_server = GrpcServer(self._services)
            await self._grpc_server.start(clients_host, settings.gateway.grpc_port)
            self._exits.push_async_callback(self._grpc_server.stop)
        self._http_server: HttpServer | None = None
        if listens:
            tls = settings.gateway.tls
            self._http_server = HttpServer(
                self._app(proxy_echoes_id=False), None if tls is None else server_context(tls)
            )
            await self._http_server.start(clients_host, settings.gateway.port)
            self._exits.push_async_callback(self._http_server.stop)
        self._is_drained = False
        self._entry = directory.entry_of_this_replica(
            "gateway", metrics_address=join_address(host.advertised, server.port)
        )
        self._watch = self._watch_over(metrics_server=server)
        await asyncio.to_thread(directory.register, self._entry)
        self._watch.start()

    def _certificates(self, *, listens: bool) -> PeerTls | None:
        """What other processes are shown; when that expires, and what clients are shown, is among the metrics."""
        metrics = CertificateMetrics(self._registry)
        gateway = self._settings.gateway
        if gateway.tls is not None and (listens or gateway.grpc_port):
            metrics.expires(ShownTo.CLIENTS, expiry(gateway.tls))
        return peer_tls(self._settings, "gateway", metrics)

    def _watch_over(self, metrics_server: MetricsServer) -> Watch:
        servers: dict[Component, Server | None] = {
            Component.METRICS_SERVER: metrics_server,
            Component.HTTP_SERVER: self._http_server,
            Component.GRPC_SERVER: self._grpc_server,
        }
        return Watch(
            (self._services.tokenizer.heartbeat,),
            {name: server for name, server in servers.items() if server is not None},
            limit_s=self._settings.ray.stall_timeout_s,
            metrics=HealthMetrics(self._registry),
            publish=partial(directory.publish_health, self._entry),
        )

    def _require_healthy(self) -> None:
        if hasattr(self, "_watch"):  # its servers answer a little earlier
            self._watch.require_healthy()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app(proxy_echoes_id=True)

    def _app(self, *, proxy_echoes_id: bool) -> FastAPI:
        return create_app(
            self._services,
            metrics_text=lambda: generate_latest(self._registry),
            metrics_targets=self._targets,
            proxy_echoes_id=proxy_echoes_id,
        )

    async def _targets(self) -> list[Any]:
        entries = await asyncio.to_thread(directory.registered, self._settings.ray.app_name)
        return list(targets_document(Target(entry.metrics_address, entry.role, entry.replica_id) for entry in entries))

    async def check_health(self) -> None:
        """Raises, and Serve replaces this replica, once one of its threads or servers doesn't work."""
        self._require_healthy()

    async def drain(self) -> None:
        """Refuse what is new; return when all that is open has finished, or was ended after ``handoff.drain_s``."""
        self._is_drained = True
        await self._backend.drain(self._settings.handoff.drain_s)

    async def __del__(self) -> None:
        if hasattr(self, "_watch"):
            await self._watch.close()
            await asyncio.to_thread(directory.unregister, self._entry)
            if not self._is_drained:
                await self._leave()
        await self._exits.aclose()

    async def _leave(self) -> None:
        """This replica alone is stopped. Serve doesn't know what our own servers answer; the next one needs their
        ports."""
        time_s = self._settings.ray.stop_timeout_s
        if self._http_server is not None:
            if not self._http_server.is_serving:
                time_s = self._settings.handoff.drain_s  # most clients are cut off as long as this one is here
            self._http_server.refuse()
        async with asyncio.TaskGroup() as leaving:
            if self._grpc_server is not None:
                leaving.create_task(self._grpc_server.stop(time_s))
            await self._backend.drain(time_s)
            if self._grpc_server is not None:
                await self._grpc_server.stop()
