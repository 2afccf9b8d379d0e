"""A TCP proxy between the pools, which can stop, slow down, reset or forget the connections that lead through it.

::

    prefill ──> listen_host:port ──[ up: to decode ]──> target_host:port ── decode
            <──                  <─[ down: to prefill ]──

It knows nothing of what it carries. What it stops it holds, as a network does that sends again: all of it arrives once
the fault is over, if anybody still listens.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

DECODE_HOST, PROXY_HOST = "127.0.0.1", "127.0.0.2"

_READ_BYTES = 1 << 16
_MAX_WAITING = 64
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of no time: closing sends RST


@dataclass(frozen=True, slots=True)
class LinkFault:
    """What happens to bytes on their way ``up`` to decode, and ``down`` to prefill. ``delay_s`` is for both ways."""

    stops_up: bool = False
    stops_down: bool = False
    delay_s: float = 0.0
    bytes_per_s: float | None = None


CLEAR = LinkFault()


class Proxy:
    """Made by ``proxying``. Belongs to one event loop."""

    def __init__(self, target_host: str) -> None:
        self._target_host = target_host
        self._fault = CLEAR
        self._changed = asyncio.Event()
        self._connections: set[_Connection] = set()
        self.num_bytes = 0

    @property
    def fault(self) -> LinkFault:
        return self._fault

    @fault.setter
    def fault(self, fault: LinkFault) -> None:
        self._fault = fault
        self._changed.set()
        self._changed = asyncio.Event()

    def reset(self) -> None:
        """Break all connections: both sides are told at once."""
        for connection in self._connections:
            connection.reset()

    def forget(self) -> None:
        """Half-open: nothing of these connections arrives any more, and neither side is told. New ones work."""
        for connection in self._connections:
            connection.is_forgotten = True

    async def passable(self, *, is_up: bool) -> None:
        """Wait until bytes may pass."""
        while self._fault.stops_up if is_up else self._fault.stops_down:
            await self._changed.wait()

    async def serve(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection to ``port`` of the target until both sides have ended it."""
        try:
            there = await asyncio.open_connection(self._target_host, port)
        except OSError:
            _reset(writer)
            return
        connection = _Connection(self, (reader, writer), there)
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)


@asynccontextmanager
async def proxying(listen_host: str, target_host: str, ports: Iterable[int]) -> AsyncIterator[Proxy]:
    """Listen on ``ports`` of ``listen_host`` for the same ports of ``target_host``. Raises OSError if one is taken."""
    proxy = Proxy(target_host)
    tasks: set[asyncio.Task[None]] = set()

    def accept(port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(proxy.serve(port, reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    servers: list[asyncio.Server] = []
    try:
        for port in ports:
            server = await asyncio.start_server(partial(accept, port), listen_host, port)
            servers.append(server)
        yield proxy
    finally:
        for server in servers:
            server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


_Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
_Waiting = asyncio.Queue[tuple[float, bytes]]


class _Connection:
    def __init__(self, proxy: Proxy, near: _Stream, far: _Stream) -> None:
        self._proxy = proxy
        self._near, self._far = near, far
        self.is_forgotten = False

    async def run(self) -> None:
        ways = ((self._near[0], self._far[1], True), (self._far[0], self._near[1], False))
        try:
            async with asyncio.TaskGroup() as group:
                for reader, writer, is_up in ways:
                    waiting: _Waiting = asyncio.Queue(_MAX_WAITING)
                    group.create_task(self._read(reader, waiting))
                    group.create_task(self._write(waiting, writer, is_up=is_up))
        except* OSError:
            self.reset()
        finally:
            for _, writer in (self._near, self._far):
                writer.close()

    def reset(self) -> None:
        for _, writer in (self._near, self._far):
            _reset(writer)

    async def _read(self, reader: asyncio.StreamReader, waiting: _Waiting) -> None:
        clock = asyncio.get_running_loop()
        while data := await reader.read(_READ_BYTES):
            await waiting.put((clock.time(), data))
        await waiting.put((clock.time(), b""))

    async def _write(self, waiting: _Waiting, writer: asyncio.StreamWriter, *, is_up: bool) -> None:
        clock = asyncio.get_running_loop()
        while True:
            read_s, data = await waiting.get()
            late_s = read_s + self._proxy.fault.delay_s - clock.time()
            if late_s > 0:
                await asyncio.sleep(late_s)
            if self._proxy.fault.bytes_per_s:
                await asyncio.sleep(len(data) / self._proxy.fault.bytes_per_s)
            await self._proxy.passable(is_up=is_up)
            if not self.is_forgotten:
                self._proxy.num_bytes += len(data)
                writer.write(data)
                if not data:
                    writer.write_eof()
                await writer.drain()
            if not data:
                return


def _reset(writer: asyncio.StreamWriter) -> None:
    held = writer.get_extra_info("socket")
    if held is not None:
        with suppress(OSError):  # it's closed already
            held.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
