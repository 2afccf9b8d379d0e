"""A gateway's end of the token streams: one to each decode replica, sorted by request.

::

    open() ─> stream: its listener goes with the request ─> the replica's place comes back ─> follow(place)
                 └─< outputs, sorted by key <── one FollowResponse a step <── decode
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import grpc
import grpc.aio

from shoal.errors import PeerGone, ShoalError
from shoal.messages import TokenOutput
from shoal.rpc.options import TOKEN_CHANNEL_OPTIONS
from shoal.rpc.outputs import OutputReader
from shoal.rpc.peers import PeerTls, open_channel, refusal
from shoal.rpc.token_server import ID_BYTES, Listener, Place
from shoal.v1 import worker_pb2 as pb
from shoal.v1.worker_pb2_grpc import WorkerServiceStub

_log = logging.getLogger(__name__)


class TokenStream:
    """One request's outputs. Iterate over it once; it ends when the request is complete."""

    def __init__(self, listener: Listener, follow: Callable[[Place], None]) -> None:
        self.listener = listener
        self.place: Place | None = None
        self._follow = follow
        self._reader = OutputReader()
        self._items: asyncio.Queue[TokenOutput | ShoalError | None] = asyncio.Queue()

    @property
    def is_complete(self) -> bool:
        """All of it has arrived, whether it was read or not."""
        return self._reader.is_complete

    def follow(self, place: Place) -> None:
        """The replica at ``place`` runs this request."""
        self.place = place
        self._follow(place)

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
    fail them with that.
    """

    def __init__(self, patience_s: float, tls: PeerTls | None = None) -> None:
        self._tls = tls
        self._gateway_id = secrets.token_bytes(ID_BYTES)
        self._patience_s = patience_s
        self._open: dict[int, TokenStream] = {}
        self._readers: dict[Place, asyncio.Task[None]] = {}

    @contextmanager
    def open(self) -> Iterator[TokenStream]:
        """A request's stream, for as long as it is waited for."""
        # Not to be guessed: outputs may come before it's known from where they must.
        stream = TokenStream(Listener(self._gateway_id, secrets.randbits(64)), self._follow)
        self._open[stream.listener.key] = stream
        try:
            yield stream
        finally:
            del self._open[stream.listener.key]

    async def close(self) -> None:
        """End all streams. Twice is a no-op."""
        readers = list(self._readers.values())
        for task in readers:
            task.cancel()
        await asyncio.gather(*readers, return_exceptions=True)

    def _follow(self, place: Place) -> None:
        if place not in self._readers:
            task = self._readers[place] = asyncio.create_task(self._read(place))
            task.add_done_callback(lambda _: self._lost(place))

    async def _read(self, place: Place) -> None:
        async with open_channel(place.address, TOKEN_CHANNEL_OPTIONS, self._tls) as channel:
            request = pb.FollowRequest(gateway_id=self._gateway_id, server_id=place.server_id)
            call = WorkerServiceStub(channel).Follow(request)
            try:
                async for message in call:
                    for output in message.outputs:
                        # One that was given up has no stream any more.
                        stream = self._open.get(output.key)
                        if stream is not None and stream.place in {None, place}:
                            stream.accept(output)
            except grpc.aio.AioRpcError as error:
                if (untrusted := refusal(error, place.address)) is not None:
                    _log.error("no tokens: %s", untrusted.message)
                return

    def _lost(self, place: Place) -> None:
        del self._readers[place]
        lost = [stream for stream in self._open.values() if stream.place == place]
        if lost:
            asyncio.get_running_loop().call_later(self._patience_s, _give_up, lost)


def _give_up(streams: list[TokenStream]) -> None:
    for stream in streams:
        stream.fail(PeerGone("the decode replica went away", retry_after_s=1.0))
