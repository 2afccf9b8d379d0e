from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from shoal_lab.chaos.proxy import CLEAR, DECODE_HOST, PROXY_HOST, LinkFault, Proxy, proxying

MESSAGE = bytes(range(256)) * 512
# How long is looked for what mustn't come; what must come is waited for.
SILENCE_S = 0.2


@dataclass
class Echo:
    """A server that sends everything back, and knows when a connection ended."""

    port: int = 0
    num_bytes: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                self.num_bytes += len(data)
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()
            self.ended.set()


@asynccontextmanager
async def proxied() -> AsyncIterator[tuple[Proxy, Echo]]:
    echo = Echo()
    server = await asyncio.start_server(echo.serve, DECODE_HOST, 0)
    echo.port = server.sockets[0].getsockname()[1]
    async with proxying(PROXY_HOST, DECODE_HOST, [echo.port]) as proxy:
        yield proxy, echo
    server.close()


async def connected(echo: Echo) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(PROXY_HOST, echo.port)


async def is_silent(reader: asyncio.StreamReader) -> bool:
    try:
        await asyncio.wait_for(reader.read(1), SILENCE_S)
    except TimeoutError:
        return True
    return False


async def test_without_a_fault_everything_passes_both_ways_and_the_end_does_too():
    async with proxied() as (proxy, echo):
        reader, writer = await connected(echo)
        writer.write(MESSAGE)
        writer.write_eof()
        assert await reader.read(-1) == MESSAGE
        await echo.ended.wait()
        assert proxy.num_bytes == 2 * len(MESSAGE)
        writer.close()


@pytest.mark.parametrize(
    ("fault", "num_arrived"),
    [(LinkFault(stops_up=True), 0), (LinkFault(stops_down=True), 3), (LinkFault(stops_up=True, stops_down=True), 0)],
)
async def test_what_a_partition_holds_arrives_when_it_is_over(fault: LinkFault, num_arrived: int):
    async with proxied() as (proxy, echo):
        reader, writer = await connected(echo)
        proxy.fault = fault
        writer.write(b"abc")
        assert await is_silent(reader)
        assert echo.num_bytes == num_arrived
        proxy.fault = CLEAR
        assert await reader.readexactly(3) == b"abc"
        writer.close()


async def test_a_delay_is_of_each_way_and_keeps_the_order():
    async with proxied() as (proxy, echo):
        reader, writer = await connected(echo)
        proxy.fault = LinkFault(delay_s=0.1)
        clock = asyncio.get_running_loop()
        began_s = clock.time()
        writer.write(MESSAGE)
        assert await reader.readexactly(len(MESSAGE)) == MESSAGE
        assert clock.time() - began_s >= 0.2
        writer.close()


async def test_a_reset_is_told_to_both_sides():
    async with proxied() as (proxy, echo):
        reader, writer = await connected(echo)
        writer.write(b"abc")
        await reader.readexactly(3)
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        await echo.ended.wait()
        writer.close()


async def test_a_forgotten_connection_says_nothing_and_a_new_one_works():
    async with proxied() as (proxy, echo):
        reader, writer = await connected(echo)
        writer.write(b"abc")
        await reader.readexactly(3)
        proxy.forget()
        writer.write(b"def")
        assert await is_silent(reader)
        assert echo.num_bytes == 3 and not echo.ended.is_set()
        again, other = await connected(echo)
        other.write(b"ghi")
        assert await again.readexactly(3) == b"ghi"
        for end in (writer, other):
            end.close()
