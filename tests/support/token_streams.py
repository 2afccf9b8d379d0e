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
from shoal.wire.token_server import Outlet, Place, TokenServer


def generate_request(*token_ids: int) -> GenerateRequest:
    return GenerateRequest(RequestContext("id", 60.0), "tiny", token_ids, Depth.FULL, SamplingParams(max_tokens=4))


def output(number: int, text: str = "") -> TokenOutput:
    return TokenOutput(0, (number,), text)


class Decode:
    """A decode replica's token server, listening."""

    def __init__(self, tls: PeerTls | None = None) -> None:
        self._tls = tls
        self.tokens = TokenServer()
        self.address = ""
        self._server: grpc.aio.Server | None = None

    @property
    def place(self) -> Place:
        return self.tokens.at(self.address)

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


class Request:
    """A request on both ends."""

    def __init__(self, decode: Decode, stream: TokenStream, outlet: Outlet) -> None:
        self.stream, self.outlet = stream, outlet
        self._decode = decode

    def follow(self) -> None:
        self.stream.follow(self._decode.place)

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

    def request(self, client: TokenClient | None = None) -> Request:
        """A new one, of this gateway unless another's ``client`` is given; nobody follows it yet."""
        stream = self.held.enter_context((client or self.client).open())
        return Request(self.decode, stream, self.held.enter_context(self.decode.tokens.open(stream.ticket)))

    async def running(self) -> Request:
        """One whose first output has arrived, so that the stream is there."""
        request = self.request()
        request.follow()
        request.outlet.send(output(0))
        assert await request.first() == output(0)
        return request


@asynccontextmanager
async def joined(patience_s: float = 0.01, tls: Path | None = None) -> AsyncIterator[Joined]:
    """Nothing may be left on either end afterwards. ``tls`` is a folder with both ends' certificates."""
    ends = (None, None) if tls is None else (PeerTls(tls, "decode"), PeerTls(tls, "gateway"))
    both = Joined(Decode(ends[0]), TokenClient(patience_s, lambda ticket: None, ends[1]))
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
