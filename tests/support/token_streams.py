"""A gateway's and a decode replica's ends of the token streams, joined by gRPC on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio

from shoal.wire.messages import Depth, GenerateRequest, RequestContext, SamplingParams, TokenOutput
from shoal.wire.options import HANDOFF_SERVER_OPTIONS
from shoal.wire.peers import PeerTls, RoleGate
from shoal.wire.ports import bind_first_free, join_address
from shoal.wire.token_client import TokenClient, TokenStream
from shoal.wire.token_server import Answer, Outlet, Place, TokenServer


def generate_request(*token_ids: int) -> GenerateRequest:
    return GenerateRequest(RequestContext("id", 60.0), "tiny", token_ids, Depth.FULL, SamplingParams(max_tokens=4))


def output(number: int, text: str = "") -> TokenOutput:
    return TokenOutput(0, (number,), text)


@dataclass
class Running:
    """A request at decode. It ends as ``end`` is told to: with a result, or an exception."""

    request: GenerateRequest
    outlet: Outlet
    end: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    is_open: bool = True


class Decode:
    """A decode replica's token server, listening. Requests ``came``, unless there is an ``answer`` for them."""

    def __init__(self, tls: PeerTls | None = None, answer: Answer | None = None) -> None:
        self._tls = tls
        self.tokens = TokenServer(answer or self._answer)
        self.came: asyncio.Queue[Running] = asyncio.Queue()
        self.address = ""
        self._server: grpc.aio.Server | None = None

    @property
    def place(self) -> Place:
        return Place(self.tokens.server_id, self.address)

    async def listen(self) -> None:
        gates = () if self._tls is None else (RoleGate(),)
        credentials = None if self._tls is None else self._tls.server_credentials()
        self._server = grpc.aio.server(interceptors=gates, options=HANDOFF_SERVER_OPTIONS)
        self.tokens.add_to(self._server)
        port = bind_first_free(self._server, "127.0.0.1", 0, 0, credentials)
        await self._server.start()
        self.address = join_address("127.0.0.1", port)

    async def vanish(self) -> None:
        """As a process that dies: every connection is gone at once."""
        if self._server is not None:
            await self._server.stop(None)

    async def _answer(self, request: GenerateRequest, outlet: Outlet) -> None:
        running = Running(request, outlet)
        self.came.put_nowait(running)
        try:
            await running.end
        finally:
            running.is_open = False


class Request:
    """A request on both ends."""

    def __init__(self, stream: TokenStream, running: Running, call: asyncio.Task[None]) -> None:
        self.stream, self.running, self.call = stream, running, call

    @property
    def outlet(self) -> Outlet:
        return self.running.outlet

    def end(self) -> None:
        self.running.end.set_result(None)

    async def first(self) -> TokenOutput:
        """The next output."""
        return await anext(aiter(self.stream))

    async def rest(self) -> list[TokenOutput]:
        return [one async for one in self.stream]


@dataclass
class Joined:
    """Requests are open on both ends until the end."""

    decode: Decode
    client: TokenClient
    held: ExitStack = field(default_factory=ExitStack)

    def open(
        self, client: TokenClient | None = None, place: Place | None = None
    ) -> tuple[TokenStream, asyncio.Task[None]]:
        """A stream whose request is on its way."""
        stream = self.held.enter_context((client or self.client).open())
        call = asyncio.create_task(stream.run(place or self.decode.place, generate_request(1)))
        self.held.callback(call.cancel)
        return stream, call

    async def request(self, client: TokenClient | None = None, place: Place | None = None) -> Request:
        """A new one that decode has, of this gateway unless another's ``client`` is given."""
        stream, call = self.open(client, place)
        return Request(stream, await asyncio.wait_for(self.decode.came.get(), 10), call)

    async def running(self) -> Request:
        """One whose first output has arrived, so that the stream is there."""
        request = await self.request()
        request.outlet.send(output(0))
        assert await request.first() == output(0)
        return request


@asynccontextmanager
async def joined(tls: Path | None = None, answer: Answer | None = None) -> AsyncIterator[Joined]:
    """Nothing may be left on either end afterwards. ``tls`` is a folder with both ends' certificates."""
    ends = (None, None) if tls is None else (PeerTls(tls, "decode"), PeerTls(tls, "gateway"))
    both = Joined(Decode(ends[0], answer), TokenClient(ends[1]))
    await both.decode.listen()
    try:
        yield both
    finally:
        both.held.close()
        await both.client.close()
        await both.decode.vanish()
        assert not both.client._open, "a request is left"
        assert not both.client._stubs and not both.client._readers, "a stream is left"
        async with asyncio.timeout(10):
            while both.decode.tokens.num_gateways:  # gRPC doesn't wait for what it cancels
                await asyncio.sleep(0)
