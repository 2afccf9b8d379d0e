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
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from shoal.errors import ConfigError
from shoal.wire.ports import join_address

_log = logging.getLogger(__name__)

_BACKLOG = 2048
_KEEP_ALIVE_S = 75
"""Longer than clients and load balancers keep a connection that is idle, a minute at most: they should end it."""
HEADERS_S = 30.0
"""How long a client may take from connecting, or from the first byte of its next request, to the end of its headers."""
_UNSENT_S = 5.0
"""How long the last bytes of an answer that was broken off may take to its client, which perhaps reads nothing."""
_MAX_HEADER_BYTES = 64 << 10
"""A read more may come on either side of it."""
_STOP_GRACE_S = 1
"""Whatever was being answered has ended by then; this only lets the last bytes out."""


class HttpServer:
    """Serves an ASGI application on the event loop that starts it."""

    def __init__(self, app: ASGIApp, tls: ssl.SSLContext | None = None) -> None:
        """With ``tls``, it speaks HTTPS alone."""
        config = uvicorn.Config(
            app,
            http=_Protocol,
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


class _Protocol(HttpToolsProtocol):
    """uvicorn itself waits for headers for as long as a client likes, and keeps as much of them, and of what may follow
    a body, as comes. It closes the connection of an answer that was broken off, but not before all of it is read. And
    it loses the body of a request that would rather go on in another protocol, as Java's clients say of HTTP/2."""

    _late: asyncio.TimerHandle | None = None
    _num_kept = 0  # bytes since the last that belonged to a body, or began or ended headers

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers(HEADERS_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._have_headers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_kept += len(data)
        self._unset_keepalive_if_required()
        try:
            self._feed(memoryview(data))
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        if self._num_kept > _MAX_HEADER_BYTES:
            self.transport.abort()

    def _feed(self, data: memoryview) -> None:
        """The parser ends at the headers of a request that asks for another protocol. A server may go on as if it
        hadn't been asked: what was parsed is parsed once more, without that header."""
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
            if self.scope["method"] == "CONNECT":
                raise httptools.HttpParserError("there is nothing to connect to here")
            method, version = self.scope["method"].encode("ascii"), self.scope["http_version"].encode("ascii")
            request = method + b" " + self.url + b" HTTP/" + version + b"\r\n"
            lines = [name + b": " + value + b"\r\n" for name, value in self.headers if name != b"upgrade"]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it
            self.parser.feed_data(b"".join((request, *lines, b"\r\n")))

    def _should_upgrade(self) -> bool:
        """No request begins at headers that ask for it: it begins once they are parsed without."""
        return True

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_headers(HEADERS_S)
        self._num_kept = 0

    def on_headers_complete(self) -> None:
        self._have_headers()
        self._num_kept = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_kept = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._late is None and self.cycle.response_complete:
            self._await_headers(_KEEP_ALIVE_S)  # uvicorn's own timer ends at any byte, of no request even

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        async def answered(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await app(scope, receive, send)
            finally:
                if cycle.response_started and not (cycle.response_complete or cycle.disconnected):
                    self._have_headers()
                    self._late = self.loop.call_later(_UNSENT_S, self.transport.abort)

        super()._start_asgi_task(cycle, answered)  # type: ignore[arg-type]  # uvicorn has names of its own for them

    def _await_headers(self, within_s: float) -> None:
        self._have_headers()
        self._late = self.loop.call_later(within_s, self._give_up, within_s, self.transport.get_write_buffer_size())

    def _give_up(self, within_s: float, num_unsent: int) -> None:
        """Unless it's we who make the client wait, or it is still reading the answer before."""
        if self.flow.read_paused or self.transport.get_write_buffer_size() < num_unsent:
            self._await_headers(within_s)
        else:
            self.transport.abort()

    def _have_headers(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


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
