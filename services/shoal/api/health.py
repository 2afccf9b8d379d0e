"""grpc.health.v1: what probes and load balancers ask."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shoal.api.backend import Readiness
from shoal.api.peers import PeerCalls
from shoal.errors import Overloaded

_log = structlog.get_logger(__name__)

SERVICE_NAME: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_WATCH_PERIOD_S = 1.0
_MAX_WATCHERS_OF_PEER = 128
_MAX_WATCHERS = 1024
"""Who watches needs no key, and wakes this process as long as it likes."""
_Status = health_pb2.HealthCheckResponse


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # no stubs
    """SERVING while a decode replica is ready: the server as a whole, whose name is empty, and ``service``."""

    def __init__(self, readiness: Callable[[], Awaitable[Readiness]], service: str) -> None:
        self._readiness = readiness
        self._names = frozenset({"", service})
        self._num_watchers = 0
        self._watchers = PeerCalls(_MAX_WATCHERS_OF_PEER)

    def add_to(self, server: grpc.aio.Server) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(self, server)

    async def Check(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: N802 - gRPC's name
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service here")
        return _Status(status=await self._status())

    async def Watch(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:  # noqa: N802
        if request.service not in self._names:
            await context.write(_Status(status=_Status.SERVICE_UNKNOWN))
            return
        if self._num_watchers >= _MAX_WATCHERS:
            raise Overloaded(f"{_MAX_WATCHERS} watch already: ask by Check, or try again later")
        with self._watchers.counted(context.peer()):
            self._num_watchers += 1
            try:
                await self._tell_changes(context)
            finally:
                self._num_watchers -= 1

    async def _tell_changes(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        last = None
        while True:
            status = await self._status()
            if status != last:
                await context.write(_Status(status=status))
                last = status
            # Nobody tells when a replica comes or goes; Ray has to be asked.
            await asyncio.sleep(_WATCH_PERIOD_S)

    async def _status(self) -> Any:
        try:
            now = await self._readiness()
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody is known to be ready
            _log.error("readiness isn't known", exc_info=error)
            return _Status.NOT_SERVING
        return _Status.SERVING if now.is_ready else _Status.NOT_SERVING
