"""The gateway's own HTTP server, on the event loop that its replica has."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from shoal.errors import ConfigError
from shoal.gateway.http_server import HttpServer


async def _hello(_request: Request) -> PlainTextResponse:
    return PlainTextResponse("hello")


async def _forever(_request: Request) -> StreamingResponse:
    async def events() -> AsyncIterator[str]:
        yield "first"
        await asyncio.Event().wait()

    return StreamingResponse(events())


def application() -> Starlette:
    return Starlette(routes=[Route("/", _hello), Route("/forever", _forever)])


async def test_it_answers_and_ends_connections_that_are_idle() -> None:
    server = HttpServer(application())
    assert not server.is_serving
    port = await server.start("127.0.0.1", 0)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        answer = await client.get("/")
        assert server.is_serving
        assert answer.text == "hello" and "server" not in answer.headers
        # The client keeps its connection; the server doesn't wait for it.
        await asyncio.wait_for(server.stop(), 5)
        with pytest.raises(httpx.ConnectError):
            await client.get("/")
    await server.stop()
    assert not server.is_serving


async def test_an_answer_that_does_not_end_is_ended() -> None:
    server = HttpServer(application())
    port = await server.start("127.0.0.1", 0)
    async with httpx.AsyncClient() as client, client.stream("GET", f"http://127.0.0.1:{port}/forever") as answer:
        pieces = answer.aiter_text()
        assert await anext(pieces) == "first"
        await asyncio.wait_for(server.stop(), 10)
        with pytest.raises(httpx.RemoteProtocolError):
            await anext(pieces)


async def test_signals_stay_as_they_were() -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    server = HttpServer(application())
    port = await server.start("127.0.0.1", 0)
    async with httpx.AsyncClient() as client:
        await client.get(f"http://127.0.0.1:{port}/")
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
    await server.stop()


async def test_a_port_that_is_taken_is_refused_by_name() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port} can't be bound .*--port"):
            await HttpServer(application()).start("127.0.0.1", port)


async def test_ipv6_has_its_brackets() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    server = HttpServer(application())
    try:
        port = await server.start("::1", 0)
    except ConfigError:
        pytest.skip("no IPv6 here")
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"http://[::1]:{port}/")).text == "hello"
    await server.stop()
