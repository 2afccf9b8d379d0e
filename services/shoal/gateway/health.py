"""grpc.health.v1 on the gateway's own gRPC server, with reflection, so that probes and people can ask."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shoal.errors import ConfigError
from shoal.gateway.backend import Readiness
from shoal.rpc.options import server_options
from shoal.rpc.ports import join_address

MAX_MESSAGE_BYTES = 1 << 20
_WATCH_PERIOD_S = 1.0
_Status = health_pb2.HealthCheckResponse


class HealthServer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # no stubs
    """SERVING while a decode replica is ready. The empty service name is the whole server."""

    def __init__(self, readiness: Callable[[], Awaitable[Readiness]]) -> None:
        self._readiness = readiness
        self._server: grpc.aio.Server | None = None

    async def start(self, host: str, port: int) -> None:
        """Listen. Raises ConfigError if the port is taken; port 0 doesn't listen at all."""
        if port == 0:
            return
        server = grpc.aio.server(options=server_options(MAX_MESSAGE_BYTES))
        health_pb2_grpc.add_HealthServicer_to_server(self, server)
        name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection((name, reflection.SERVICE_NAME), server)
        address = join_address(host, port)
        try:
            server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(f"{address} can't be bound: choose another --grpc-port, or 0 for none") from error
        await server.start()
        self._server = server

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(grace=None)

    async def Check(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: N802 - gRPC's name
        if request.service:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service here")
        return _Status(status=await self._status())

    async def Watch(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:  # noqa: N802
        if request.service:
            await context.write(_Status(status=_Status.SERVICE_UNKNOWN))
            return
        last = None
        while True:
            status = await self._status()
            if status != last:
                await context.write(_Status(status=status))
                last = status
            # Nobody tells when a replica comes or goes; Ray has to be asked.
            await asyncio.sleep(_WATCH_PERIOD_S)

    async def _status(self) -> Any:
        return _Status.SERVING if (await self._readiness()).is_ready else _Status.NOT_SERVING
