"""The gateway's own HTTP server: a token goes from the process that gets it from decode straight to the client.

Ray Serve's proxy would be one process more on its way. Where something needs the proxy (KubeRay looks at it, and turns
clients from one cluster to the next by it), the same application stands behind it instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Generator

import uvicorn
from starlette.types import ASGIApp

from shoal.errors import ConfigError
from shoal.rpc.ports import join_address

_log = logging.getLogger(__name__)

_BACKLOG = 2048
_KEEP_ALIVE_S = 75
"""Longer than clients and load balancers keep a connection that is idle, a minute at most: they should end it."""
_STOP_GRACE_S = 1
"""Whatever was being answered has ended by then; this only lets the last bytes out."""


class HttpServer:
    """Serves an ASGI application on the event loop that starts it."""

    def __init__(self, app: ASGIApp, tls: ssl.SSLContext | None = None) -> None:
        """With ``tls``, it speaks HTTPS alone."""
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,  # the gateway's log has a line a request already
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_STOP_GRACE_S,
        )
        config.load()
        config.ssl = tls  # of its own options it would read files once
        self._server = _Server(config)
        self._listener: socket.socket | None = None
        self._serving: asyncio.Task[None] | None = None

    @property
    def is_serving(self) -> bool:
        """From ``start`` to ``stop``, unless a defect ended it."""
        return self._serving is not None and not self._serving.done()

    async def start(self, host: str, port: int) -> int:
        """Listen on ``port``, or on any free one if it's 0; returns it. Raises ConfigError if it can't be bound."""
        self._listener = listener = _listen(host, port)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        self._serving.add_done_callback(_ended)
        bound: int = listener.getsockname()[1]
        return bound

    def refuse(self) -> None:
        """Take no new connections; another process may listen in this one's place."""
        for server in getattr(self._server, "servers", ()):  # it has them once it's up
            server.close()
        if self._listener is not None:
            self._listener.close()

    async def stop(self) -> None:
        """End all connections. Twice is a no-op."""
        self._server.should_exit = True
        if self._serving is not None:
            await asyncio.wait([self._serving])


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals are the replica's: Serve ends it, and then we are stopped."""
        yield


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            # Of the options that would be usual, not IPV6_V6ONLY: "::" is every address, as it is for gRPC.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"{join_address(host, port)} can't be bound ({error.strerror}): choose another --port, or a --host that is "
            "this machine's"
        ) from error
    return listener


def _ended(serving: asyncio.Task[None]) -> None:
    if not serving.cancelled() and (error := serving.exception()) is not None:
        _log.error("the HTTP server ended", exc_info=error)
