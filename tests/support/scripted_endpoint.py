"""A real HTTP server whose every byte and pause a test decides, in the test's own event loop; and clocks for it."""

from __future__ import annotations

import asyncio
import heapq
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: Any


class Wire:
    """The way back to one client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @property
    def peer(self) -> Any:
        return self._writer.get_extra_info("peername")

    async def gone(self) -> None:
        """Wait until the client has hung up."""
        await self._reader.read()

    async def start(self, status: int = 200, content_type: str = "text/event-stream") -> None:
        head = f"HTTP/1.1 {status} Said\r\ncontent-type: {content_type}\r\ntransfer-encoding: chunked\r\n\r\n"
        self._writer.write(head.encode())
        await self._writer.drain()

    async def send(self, data: bytes) -> None:
        """One chunk of HTTP."""
        self._writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        await self._writer.drain()

    async def end(self) -> None:
        self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()

    async def answer(self, document: object, status: int = 200) -> None:
        """A whole JSON body."""
        await self.start(status, "application/json")
        await self.send(json.dumps(document).encode())
        await self.end()

    def break_off(self) -> None:
        self._writer.close()


Script = Callable[[Request, Wire], Awaitable[None]]


@dataclass
class ScriptedEndpoint:
    """``script`` answers each POST; GET /v1/models lists ``models``. Requests are kept, the oldest first."""

    script: Script
    models: Sequence[str] = ("scripted",)
    url: str = ""
    requests: list[Request] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request = await _read(reader)
                self.requests.append(request)
                if request.method == "GET":
                    await Wire(reader, writer).answer({"data": [{"id": name} for name in self.models]})
                else:
                    await self.script(request, Wire(reader, writer))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def scripted(script: Script | None = None, **options: Any) -> AsyncIterator[ScriptedEndpoint]:
    endpoint = ScriptedEndpoint(script or whole_answer, **options)
    server = await asyncio.start_server(endpoint.serve, "127.0.0.1", 0)
    endpoint.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield endpoint
    finally:
        server.close()


def event(document: object) -> bytes:
    return f"data: {json.dumps(document)}\n\n".encode()


def token(text: str = " word", finish_reason: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]})


def usage(counts: object = None) -> bytes:
    return event({"choices": [], "usage": counts or USAGE})


DONE = b"data: [DONE]\n\n"


async def whole_answer(request: Request, wire: Wire) -> None:
    """As many tokens as were asked for, at once, in the words of the path."""
    number = request.body["max_tokens"]
    await wire.start()
    for index in range(number):
        finish_reason = "length" if index + 1 == number else None
        if request.path.endswith("/chat/completions"):
            size = len(request.body["messages"][0]["content"]) // 4
            await wire.send(event({"choices": [{"delta": {"content": " word"}, "finish_reason": finish_reason}]}))
        else:
            size = len(request.body["prompt"])
            await wire.send(token(finish_reason=finish_reason))
    await wire.send(usage({"prompt_tokens": size, "completion_tokens": number}) + DONE)
    await wire.end()


async def _read(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Request(method, path, headers, json.loads(body) if body else None)


class HandClock:
    """Stands where it is put. ``looked`` waits until a client has looked at it, once for each time it was."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._looks = asyncio.Semaphore(0)

    def now(self) -> float:
        self._looks.release()
        return self.now_s

    def cpu_s(self) -> float:
        return 0.0

    async def looked(self) -> None:
        await self._looks.acquire()

    async def wait_until(self, moment_s: float) -> None:
        self.now_s = max(self.now_s, moment_s)
        await asyncio.sleep(0)


class VirtualClock:
    """Jumps to the next moment that somebody waits for, once all tasks wait. ``cpu_share`` of all time is computing."""

    _TURNS = 20  # of the loop, so that whatever can run has run

    def __init__(self, cpu_share: float = 0.0) -> None:
        self.now_s, self._cpu_share = 0.0, cpu_share
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._num = 0

    def now(self) -> float:
        return self.now_s

    def cpu_s(self) -> float:
        return self._cpu_share * self.now_s

    async def wait_until(self, moment_s: float) -> None:
        woken = asyncio.get_running_loop().create_future()
        self._num += 1
        heapq.heappush(self._waiting, (max(moment_s, self.now_s), self._num, woken))
        await woken

    async def run(self, work: Awaitable[Any]) -> Any:
        """``work``'s result, in no time."""
        task = asyncio.ensure_future(work)
        while not task.done():
            for _ in range(self._TURNS):
                await asyncio.sleep(0)
            if self._waiting and not task.done():
                self.now_s, _, woken = heapq.heappop(self._waiting)
                woken.set_result(None)
        return await task
