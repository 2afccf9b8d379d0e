"""The gateway's own gRPC server: inference, health, and reflection where it's wanted.

Ray Serve's proxy could carry gRPC, too, but it listens on every interface, has no TLS, and sends the text of
unexpected errors to clients.
"""

from __future__ import annotations

import asyncio

import grpc.aio
from grpc_reflection.v1alpha import reflection

from shoal.api import health, inference
from shoal.api.grpc_edge import GrpcEdge
from shoal.api.health import HealthService
from shoal.api.inference import InferenceService
from shoal.api.intake import Services
from shoal.api.tls import server_credentials
from shoal.config import GatewayConfig
from shoal.errors import ConfigError
from shoal.wire.options import Options, server_options
from shoal.wire.ports import join_address

_STOP_GRACE_S = 0.5
"""Whatever was being answered has ended by then; this only lets the last messages out."""

_MAX_READ_BODIES = 2
"""A client that sent a little too much gets to read why: what gRPC itself refuses looks like an overload."""

_UNREAD_BYTES = 1024
"""What a client may send of a message before it is asked for; most messages are shorter."""

_SPARE_STREAMS = 128
"""Beside what runs: for health, and for calls that are one too many, which have to come to be told so."""


class GrpcServer:
    """Serves what ``services`` generate, under ``services.config``."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._server: grpc.aio.Server | None = None
        self._serving: asyncio.Task[bool] | None = None

    @property
    def is_serving(self) -> bool:
        """From ``start`` to ``stop``, unless a defect ended it."""
        return self._serving is not None and not self._serving.done()

    async def start(self, host: str, port: int) -> int:
        """Listen on ``port``, or on any free one if it's 0; returns it.

        Raises ConfigError if the port can't be bound or a file of ``config.tls`` isn't what it should be.
        """
        services, config = self._services, self._services.config
        credentials = None if config.tls is None else server_credentials(config.tls)
        edge = GrpcEdge(services.access, services.bodies, services.observer)
        server = grpc.aio.server(interceptors=(edge,), options=_options(config))
        InferenceService(self._services).add_to(server)
        HealthService(self._services.readiness, inference.SERVICE_NAME).add_to(server)
        if config.reflection:
            names = (inference.SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        address = join_address(host, port)
        try:
            if credentials is None:
                bound = server.add_insecure_port(address)
            else:
                bound = server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ConfigError(f"{address} can't be bound: choose another --grpc-port, or 0 for none") from error
        await server.start()
        self._server = server
        self._serving = asyncio.create_task(server.wait_for_termination())
        return bound

    async def stop(self, grace_s: float = _STOP_GRACE_S) -> None:
        """Take no new calls, and after ``grace_s`` end those that are open. A second time may end them sooner."""
        if self._server is not None:
            await self._server.stop(grace_s)


def _options(config: GatewayConfig) -> Options:
    return (
        # gRPC takes the first of two values. An answer is as long as was asked for: clients limit what they read.
        ("grpc.max_send_message_length", -1),
        # One connection may bring all that may run. More wait at its client.
        ("grpc.max_concurrent_streams", config.max_running + _SPARE_STREAMS),
        # Unasked, gRPC takes the whole message of a call that nobody reads yet, or that shows no key.
        ("grpc.http2.lookahead_bytes", _UNREAD_BYTES),
        ("grpc.http2.bdp_probe", 0),
        *server_options(_MAX_READ_BODIES * config.max_body_bytes),
    )
