"""Who may come in is decided before a request is read, by a real server: what waits to be refused holds no memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest

from shoal.api import deadline, endpoint
from shoal.api.http_app import create_app
from shoal.api.http_server import HttpServer
from shoal.api.intake import Services

BODY = {"model": "smollm2", "prompt": [5, 6, 7], "max_tokens": 2}
NUM_BYTES = 4 << 20


@pytest.fixture
def one_place(services: Services) -> Services:
    return replace(services, config=services.config.model_copy(update={"max_running": 1}))


@pytest.fixture
async def port(one_place: Services) -> AsyncIterator[int]:
    server = HttpServer(create_app(one_place))
    yield await server.start("127.0.0.1", 0)
    await server.stop()


async def begin(port: int, num_bytes: int, sent: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A request of ``num_bytes``, of which no more than ``sent`` comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-length: {num_bytes}\r\n\r\n"
    writer.write(head.encode() + sent)
    await writer.drain()
    return reader, writer


async def status_of(reader: asyncio.StreamReader) -> int:
    return int((await asyncio.wait_for(reader.readline(), 10)).split()[1])


@pytest.mark.parametrize("num_sent", [0, 1 << 16, NUM_BYTES])
async def test_one_too_many_is_told_so_whatever_it_has_sent(port: int, one_place: Services, num_sent: int):
    with one_place.places.taken():
        reader, writer = await begin(port, NUM_BYTES, b" " * num_sent)
        assert await status_of(reader) == 429
        assert one_place.places.num_taken == 1
        writer.close()


async def test_who_is_still_sending_has_a_place_until_it_leaves(port: int, one_place: Services):
    _, writer = await begin(port, 100, json.dumps(BODY)[:10].encode())
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        while not one_place.places.num_taken:
            await asyncio.sleep(0)
        refused = await client.post("/v1/completions", json=BODY)
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "overloaded"
        writer.close()
        while one_place.places.num_taken:
            await asyncio.sleep(0)
        assert (await client.post("/v1/completions", json=BODY)).status_code == 200


async def test_who_does_not_send_on_has_a_place_for_a_while_only(
    port: int, one_place: Services, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(endpoint, "BODY_S", 0.1)
    monkeypatch.setattr(deadline, "GRACE_S", 0.1)
    reader, writer = await begin(port, 100, b"{")
    assert await status_of(reader) == 504
    assert one_place.places.num_taken == 0
    writer.close()
