"""The gateway's own HTTP server, on the event loop that its replica has."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from shoal.api import http_server
from shoal.api.edge import RequestEdge
from shoal.api.http_server import HttpServer
from shoal.errors import ConfigError, DeadlineExceeded


async def _hello(_request: Request) -> PlainTextResponse:
    return PlainTextResponse("hello")


async def _forever(_request: Request) -> StreamingResponse:
    async def events() -> AsyncIterator[str]:
        yield "first"
        await asyncio.Event().wait()

    return StreamingResponse(events())


async def _body(request: Request) -> PlainTextResponse:
    return PlainTextResponse(await request.body())


LONG = 32 << 20
"""More than the system keeps for a connection."""


async def _long(_request: Request) -> PlainTextResponse:
    return PlainTextResponse(b"x" * LONG)


def application() -> Starlette:
    return Starlette(
        routes=[
            Route("/", _hello),
            Route("/long", _long),
            Route("/body", _body, methods=["POST"]),
            Route("/forever", _forever),
        ]
    )


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def serving(app: ASGIApp | None = None, host: str = "127.0.0.1") -> AsyncIterator[tuple[HttpServer, int]]:
    """A server, and its port."""
    server = HttpServer(app or application())
    port = await server.start(host, 0)
    try:
        yield server, port
    finally:
        await server.stop()


@asynccontextmanager
async def connection_to(port: int, *, limit: int = 1 << 16, kept_bytes: int | None = None) -> AsyncIterator[Connection]:
    """One for which the system keeps about ``kept_bytes`` that aren't read yet."""
    client = socket.socket()
    if kept_bytes is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, kept_bytes)
    client.connect(("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=client, limit=limit)
    try:
        yield reader, writer
    finally:
        writer.close()


@asynccontextmanager
async def connected(app: ASGIApp | None = None) -> AsyncIterator[Connection]:
    """To a server of its own."""
    async with serving(app) as (_, port), connection_to(port) as connection:
        yield connection


async def test_it_answers_and_ends_connections_that_are_idle() -> None:
    assert not HttpServer(application()).is_serving
    async with serving() as (server, port), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        answer = await client.get("/")
        assert server.is_serving
        assert answer.text == "hello" and "server" not in answer.headers
        # The client keeps its connection; the server doesn't wait for it.
        await asyncio.wait_for(server.stop(), 5)
        with pytest.raises(httpx.ConnectError):
            await client.get("/")
        assert not server.is_serving


async def test_an_answer_that_does_not_end_is_ended() -> None:
    async with (
        serving() as (server, port),
        httpx.AsyncClient() as client,
        client.stream("GET", f"http://127.0.0.1:{port}/forever") as answer,
    ):
        pieces = answer.aiter_text()
        assert await anext(pieces) == "first"
        await asyncio.wait_for(server.stop(), 10)
        with pytest.raises(httpx.RemoteProtocolError):
            await anext(pieces)


async def test_signals_stay_as_they_were() -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    async with serving() as (_, port), httpx.AsyncClient() as client:
        await client.get(f"http://127.0.0.1:{port}/")
        assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


# What Java's HttpClient says on a connection that isn't encrypted, and others of a protocol that isn't spoken here.
UPGRADES = [
    "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAAB",
    "connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nsec-websocket-version: 13",
]


@pytest.mark.parametrize("upgrade", UPGRADES)
@pytest.mark.parametrize("apart", [0, 1, 7], ids="{} bytes apart".format)
async def test_who_would_rather_speak_another_protocol_is_answered_in_this_one(upgrade: str, apart: int) -> None:
    async with connected() as (reader, writer):
        head = f"POST /body HTTP/1.1\r\nhost: here\r\n{upgrade}\r\n"
        asked = f"{head}content-length: 5\r\n\r\nfirst"
        chunked = f"{head}transfer-encoding: chunked\r\n\r\n6\r\nsecond\r\n0\r\n\r\n"
        last = "GET / HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n"
        sent = (asked + chunked + last).encode()
        for start in range(0, len(sent), apart or len(sent)):
            writer.write(sent[start : start + (apart or len(sent))])
            await writer.drain()
        got = await asyncio.wait_for(reader.read(), 20)
        answers = got.split(b"HTTP/1.1 200 OK")[1:]
        assert [answer.rpartition(b"\r\n")[2] for answer in answers] == [b"first", b"second", b"hello"], got


async def test_nothing_is_connected_to() -> None:
    async with connected() as (reader, writer):
        writer.write(b"CONNECT other:443 HTTP/1.1\r\nhost: other\r\n\r\n")
        assert (await asyncio.wait_for(reader.read(), 20)).startswith(b"HTTP/1.1 400 ")


ENDLESS = [b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nhost: here\r\nx-", b"GET /", b"\r\n"]


@pytest.mark.parametrize("before", [b"", b"GET / HTTP/1.1\r\nhost: here\r\n\r\n"], ids=["first", "second request"])
@pytest.mark.parametrize("sent", [b"", *ENDLESS], ids=repr)
async def test_headers_that_do_not_end_are_waited_for_no_longer_than_a_while(
    before: bytes, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "HEADERS_S", 0.2)
    monkeypatch.setattr(http_server, "_KEEP_ALIVE_S", 0.2)  # of what has been answered and says no more
    async with connected() as (reader, writer):
        writer.write(before)
        if before:
            assert await asyncio.wait_for(reader.readuntil(b"hello"), 20)
        writer.write(sent)
        with suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), 20) == b""


@pytest.mark.parametrize("piece", [b"x-more: 1\r\n" * 800, b"x" * 8000], ids=["many headers", "a long one"])
@pytest.mark.parametrize(
    "line",
    [
        b"GET / HTTP/1.1\r\nhost: here\r\n",
        b"GET /",
        b"POST /body HTTP/1.1\r\nhost: here\r\ntransfer-encoding: chunked\r\n\r\n1\r\n.\r\n0\r\n",
    ],
    ids=["headers", "a path", "after a body"],
)
async def test_headers_that_do_not_end_are_read_no_further_than_a_bound(line: bytes, piece: bytes) -> None:
    async def send_for_ever(writer: asyncio.StreamWriter) -> None:
        writer.write(line)
        for _ in range((64 << 20) // len(piece)):
            writer.write(piece)
            await writer.drain()

    async with connected() as (_, writer):
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            await send_for_ever(writer)


async def test_for_a_body_and_an_answer_nobody_waits_by_the_clock_of_headers() -> None:
    asked, ended = asyncio.Event(), asyncio.Event()

    async def slow(request: Request) -> PlainTextResponse:
        asked.set()
        body = await request.body()
        await ended.wait()
        return PlainTextResponse(body)

    app, size = Starlette(routes=[Route("/", slow, methods=["POST"])]), 1 << 20
    async with serving(app) as (server, port), connection_to(port, limit=2 * size) as (reader, writer):
        for _ in range(2):  # the second one on the connection of the first
            asked.clear()
            ended.clear()
            writer.write(b"POST / HTTP/1.1\r\nhost: here\r\ncontent-length: %d\r\n\r\n" % size + b"1" * (size - 1))
            await asyncio.wait_for(asked.wait(), 20)
            [connection] = server._server.server_state.connections
            assert isinstance(connection, http_server._Protocol) and connection._late is None
            writer.write(b"2")
            ended.set()
            assert await asyncio.wait_for(reader.readuntil(b"12"), 20)


async def test_who_reads_slowly_gets_the_whole_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as good as sent to the server, but not to the client."""
    monkeypatch.setattr(http_server, "_KEEP_ALIVE_S", 1.0)
    async with serving() as (_, port), connection_to(port, kept_bytes=1 << 16) as (reader, writer):
        writer.write(b"GET /long HTTP/1.1\r\nhost: here\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        num_read = 0
        for _ in range(8):  # pieces that take more than twice as long as an idle connection has
            num_read += len(await reader.readexactly(LONG // 16))
            await asyncio.sleep(0.3)
        while num_read < LONG:
            num_read += len(await reader.readexactly(LONG // 16))


async def _broken_off(_request: Request) -> StreamingResponse:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"x" * LONG
        raise DeadlineExceeded("after which nobody knows the rest")

    return StreamingResponse(pieces())


def breaking_off() -> ASGIApp:
    return RequestEdge(Starlette(routes=[Route("/", _broken_off)]))


async def test_who_reads_nothing_of_an_answer_that_was_broken_off_is_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_UNSENT_S", 0.1)
    is_lost = asyncio.Event()

    class Noticed(http_server._Protocol):
        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            is_lost.set()

    monkeypatch.setattr(http_server, "_Protocol", Noticed)
    async with serving(breaking_off()) as (server, port):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")
            await asyncio.wait_for(is_lost.wait(), 20)
            assert not server._server.server_state.connections


async def test_who_reads_gets_all_that_an_answer_had_before_it_was_broken_off() -> None:
    async with connected(breaking_off()) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        rest = await asyncio.wait_for(reader.read(), 20)
        assert rest.count(b"x") == LONG and not rest.endswith(b"0\r\n\r\n")


async def test_it_listens_on_its_address_alone() -> None:
    async with serving() as (_, port):
        with socket.create_connection(("127.0.0.1", port)), pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port))


async def test_a_port_that_is_taken_is_refused_by_name() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port} can't be bound .*--port"):
            await HttpServer(application()).start("127.0.0.1", port)


async def test_ipv6_has_its_brackets() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        async with serving(host="::1") as (_, port), httpx.AsyncClient() as client:
            assert (await client.get(f"http://[::1]:{port}/")).text == "hello"
    except ConfigError:
        pytest.skip("no IPv6 here")
