"""A gateway's end of the token streams: one to each decode replica, sorted by request.

::

    open() ─> stream: its ticket goes to decode ─> the replica's place comes back ─> follow(place), submit(request)
                 └─< outputs, sorted by key <── one FollowResponse a step <── decode
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from shoal.errors import PeerGone, ProtocolViolation, ShoalError
from shoal.v1 import worker_pb2 as pb
from shoal.v1.worker_pb2_grpc import WorkerServiceStub
from shoal.wire.messages import GenerateRequest, Ticket, TokenOutput
from shoal.wire.options import TOKEN_CHANNEL_OPTIONS
from shoal.wire.outputs import OutputReader
from shoal.wire.peers import PeerTls, open_channel, refusal
from shoal.wire.requests import to_submit
from shoal.wire.statuses import from_rpc_error
from shoal.wire.token_server import ID_BYTES, Place

if TYPE_CHECKING:
    from shoal.v1.worker_pb2_grpc import WorkerServiceAsyncStub

_log = logging.getLogger(__name__)


class TokenStream:
    """One request's outputs. Iterate over it once; it ends when the request is complete."""

    def __init__(self, ticket: Ticket, client: TokenClient) -> None:
        self.ticket = ticket
        self.place: Place | None = None
        self._client = client
        self._reader = OutputReader()
        self._items: asyncio.Queue[TokenOutput | ShoalError | None] = asyncio.Queue()

    @property
    def has_begun(self) -> bool:
        """Some of it has arrived."""
        return self._reader.has_begun

    @property
    def is_complete(self) -> bool:
        """All of it has arrived, whether it was read or not."""
        return self._reader.is_complete

    def follow(self, place: Place) -> None:
        """The replica at ``place`` runs this request."""
        self.place = place
        self._client.follow(place)

    async def submit(self, request: GenerateRequest) -> None:
        """Bring the request to the replica that is followed. What that one says against it ends the stream.

        Raises RequestTooLarge or Unavailable if no message holds it.
        """
        await self._client.submit(self, request)

    def fail(self, error: ShoalError) -> None:
        """End it with ``error``, after what has come already; nothing if it is complete."""
        if not self.is_complete:
            self._items.put_nowait(error)

    def accept(self, message: pb.Output) -> None:
        try:
            output = self._reader.read(message)
        except ShoalError as error:
            self.fail(error)
            return
        if output is not None:
            self._items.put_nowait(output)
        elif self.is_complete:
            self._items.put_nowait(None)

    def __aiter__(self) -> AsyncIterator[TokenOutput]:
        return self

    async def __anext__(self) -> TokenOutput:
        """Raises what it was failed with."""
        item = await self._items.get()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, ShoalError):
            raise item
        return item


class TokenClient:
    """Belongs to one event loop. A stream to a replica opens with the first request there, and stays.

    A stream that breaks ends its requests with PeerGone ``patience_s`` later: whoever placed them may know better, and
    fail them with that. ``heard`` is told as outputs arrive, however late they're read: of each request's first one,
    and of one in each message.
    """

    def __init__(self, patience_s: float, heard: Callable[[Ticket], None], tls: PeerTls | None = None) -> None:
        self._tls = tls
        self._heard = heard
        self._gateway_id = secrets.token_bytes(ID_BYTES)
        self._patience_s = patience_s
        self._open: dict[int, TokenStream] = {}
        self._channels: dict[Place, grpc.aio.Channel] = {}
        self._stubs: dict[Place, WorkerServiceAsyncStub] = {}
        self._readers: set[asyncio.Task[None]] = set()

    @contextmanager
    def open(
        self, prefix_keys: tuple[bytes, ...] = (), excluded: frozenset[str] = frozenset()
    ) -> Iterator[TokenStream]:
        """A request's stream, for as long as it is waited for. What is given is for the router (``Ticket``)."""
        # Not to be guessed: outputs may come before it's known from where they must.
        stream = TokenStream(Ticket(self._gateway_id, secrets.randbits(64), prefix_keys, excluded), self)
        self._open[stream.ticket.key] = stream
        try:
            yield stream
        finally:
            del self._open[stream.ticket.key]

    async def close(self) -> None:
        """End all streams. Twice is a no-op."""
        readers = list(self._readers)
        for task in readers:
            task.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        # Of those that had not begun.
        self._stubs.clear()
        while self._channels:
            await self._channels.popitem()[1].close(None)

    def follow(self, place: Place) -> None:
        """Read what the replica there sends, if that isn't done already."""
        if place not in self._stubs:
            channel = open_channel(place.address, TOKEN_CHANNEL_OPTIONS, self._tls)
            self._channels[place] = channel
            self._stubs[place] = WorkerServiceStub(channel)
            task = asyncio.create_task(self._read(place, channel))
            self._readers.add(task)
            task.add_done_callback(self._readers.discard)

    async def submit(self, stream: TokenStream, request: GenerateRequest) -> None:
        place = stream.place
        if place is None or place not in self._stubs:
            return  # it's lost already, and the stream hears of it
        try:
            await self._stubs[place].Submit(to_submit(stream.ticket, place.server_id, request))
        except grpc.aio.AioRpcError as error:
            known = from_rpc_error(error)
            lost = _gone() if refusal(error, place.address) is None else _untrusted()
            self._fail_later([stream], known if isinstance(known, ProtocolViolation) else lost)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # The channel was closed, and the stream hears of it.

    async def _read(self, place: Place, channel: grpc.aio.Channel) -> None:
        request = pb.FollowRequest(gateway_id=self._gateway_id, server_id=place.server_id)
        lost = _gone()
        try:
            async for message in self._stubs[place].Follow(request):
                is_heard = False
                for output in message.outputs:
                    # One that was given up has no stream any more.
                    stream = self._open.get(output.key)
                    if stream is None or stream.place not in {None, place}:
                        continue
                    if not (is_heard and stream.has_begun):
                        self._heard(stream.ticket)
                        is_heard = True
                    stream.accept(output)
        except grpc.aio.AioRpcError as error:
            if (untrusted := refusal(error, place.address)) is not None:
                _log.error("no tokens: %s", untrusted.message)
                lost = _untrusted()
        finally:
            del self._stubs[place]
            self._fail_later([stream for stream in self._open.values() if stream.place == place], lost)
            self._channels.pop(place, None)
            await channel.close(None)

    def _fail_later(self, streams: Sequence[TokenStream], error: ShoalError) -> None:
        for stream in streams:
            asyncio.get_running_loop().call_later(self._patience_s, stream.fail, error)


def _untrusted() -> PeerGone:
    return PeerGone("the gateway and a decode replica don't trust each other: the logs say why", retry_after_s=1.0)


def _gone() -> PeerGone:
    return PeerGone("the decode replica went away", retry_after_s=1.0)
