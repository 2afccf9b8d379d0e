"""A gateway's end of the token streams: one to each decode replica, sorted by request.

::

    open() ─> stream.run(place, request): Submit, which stays open until the request has ended there
                 └─< outputs, sorted by key <── one FollowResponse a step <── the replica at that place
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from shoal.errors import Cancelled, InternalError, PeerGone, ShoalError
from shoal.v1 import worker_pb2 as pb
from shoal.v1.worker_pb2_grpc import WorkerServiceStub
from shoal.wire.messages import GenerateRequest, TokenOutput
from shoal.wire.options import TOKEN_CHANNEL_OPTIONS
from shoal.wire.outputs import OutputReader
from shoal.wire.peers import PeerTls, open_channel, refusal
from shoal.wire.requests import to_submit
from shoal.wire.statuses import from_rpc_error
from shoal.wire.token_server import ID_BYTES, Place

if TYPE_CHECKING:
    from shoal.v1.worker_pb2_grpc import WorkerServiceAsyncStub

ARRIVE_S = 10.0
"""What decode has written by the end of its call is here by then."""
_log = logging.getLogger(__name__)


class TokenStream:
    """One request's outputs. Iterate over it once; it ends when the request is complete.

    ``accepted`` is called when the replica has taken the request, ``heard`` as outputs arrive, however late they are
    read: with the first one, and with one in each message.
    """

    def __init__(self, key: int, client: TokenClient, accepted: Callable[[], None], heard: Callable[[], None]) -> None:
        self.key = key
        self.place: Place | None = None
        self.accepted = accepted
        self.heard = heard
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

    async def run(self, place: Place, request: GenerateRequest) -> None:
        """Have the replica at ``place`` run it; returns when it has ended there, and raises nothing: what is wrong ends
        the iteration. Cancelling this ends the request there."""
        self.place = place
        await self._client.run(self, place, request)

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
    """Belongs to one event loop. A stream to a replica opens with the first request there, and stays; one that breaks
    ends its requests with PeerGone."""

    def __init__(self, tls: PeerTls | None = None) -> None:
        self._tls = tls
        self._gateway_id = secrets.token_bytes(ID_BYTES)
        self._open: dict[int, TokenStream] = {}
        self._channels: dict[Place, grpc.aio.Channel] = {}
        self._stubs: dict[Place, WorkerServiceAsyncStub] = {}
        self._readers: set[asyncio.Task[None]] = set()
        self._draining: set[Place] = set()

    @property
    def draining(self) -> frozenset[bytes]:
        """Ids of the decode processes that want no more requests: they finish those that they have."""
        return frozenset(place.server_id for place in self._draining)

    @contextmanager
    def open(
        self, accepted: Callable[[], None] = lambda: None, heard: Callable[[], None] = lambda: None
    ) -> Iterator[TokenStream]:
        """A request's stream, for as long as it is waited for."""
        # Not to be guessed by another replica, which could speak for this one.
        stream = TokenStream(secrets.randbits(64), self, accepted, heard)
        self._open[stream.key] = stream
        try:
            yield stream
        finally:
            del self._open[stream.key]

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

    async def run(self, stream: TokenStream, place: Place, request: GenerateRequest) -> None:
        """As ``TokenStream.run``."""
        try:
            message = to_submit(self._gateway_id, stream.key, place.server_id, request)
            await self._follow(place).Submit(message)
        except ShoalError as error:  # no message holds it
            stream.fail(error)
        except grpc.aio.AioRpcError as error:
            stream.fail(_why(error, place))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            stream.fail(_gone())  # the channel was closed
        except Exception as error:  # noqa: BLE001 - whatever it is, the answer mustn't wait for its deadline
            _log.exception("the call to decode failed")
            stream.fail(InternalError(f"the call to decode failed ({type(error).__name__})"))
        else:
            if not stream.is_complete:
                lost = PeerGone("the decode replica has finished, and its answer didn't arrive", retry_after_s=1.0)
                asyncio.get_running_loop().call_later(ARRIVE_S, stream.fail, lost)

    def _follow(self, place: Place) -> WorkerServiceAsyncStub:
        """Read what the replica there sends, if that isn't done already."""
        if place not in self._stubs:
            channel = open_channel(place.address, TOKEN_CHANNEL_OPTIONS, self._tls)
            self._channels[place] = channel
            self._stubs[place] = WorkerServiceStub(channel)
            task = asyncio.create_task(self._read(place, channel))
            self._readers.add(task)
            task.add_done_callback(self._readers.discard)
        return self._stubs[place]

    async def _read(self, place: Place, channel: grpc.aio.Channel) -> None:
        request = pb.FollowRequest(gateway_id=self._gateway_id, server_id=place.server_id)
        lost: ShoalError = _gone()
        try:
            async for message in self._stubs[place].Follow(request):
                if message.is_draining:
                    self._draining.add(place)
                is_heard = False
                for output in message.outputs:
                    # One that was given up has no stream any more.
                    stream = self._open.get(output.key)
                    if stream is None or stream.place != place:
                        continue
                    if output.is_accepted:
                        stream.accepted()
                        continue
                    if not (is_heard and stream.has_begun):
                        stream.heard()
                        is_heard = True
                    stream.accept(output)
        except grpc.aio.AioRpcError as error:
            lost = _why(error, place, is_told=True)
        finally:
            del self._stubs[place]
            self._draining.discard(place)
            for stream in self._open.values():
                if stream.place == place:
                    stream.fail(lost)
            self._channels.pop(place, None)
            await channel.close(None)


def _why(error: grpc.aio.AioRpcError, place: Place, *, is_told: bool = False) -> ShoalError:
    """What a call's end means to a client; to the operator it ``is_told`` which address isn't trusted, and why."""
    if (untrusted := refusal(error, place.address)) is not None:
        if is_told:
            _log.error("no tokens: %s", untrusted.message)
        return PeerGone("the gateway and a decode replica don't trust each other: the logs say why", retry_after_s=1.0)
    known = from_rpc_error(error)
    # gRPC's own words name addresses.
    return _gone() if isinstance(known, PeerGone | Cancelled) else known


def _gone() -> PeerGone:
    return PeerGone("the decode replica went away", retry_after_s=1.0)
