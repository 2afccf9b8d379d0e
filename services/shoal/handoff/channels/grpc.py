"""The two ends of HandoffService.Session over grpc.aio.

What prefill sends goes as bytes (wire/protobuf.py), past the messages that generated code would make of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from shoal.errors import HandoffError, PeerGone, ShoalError
from shoal.handoff.base import Channel
from shoal.v1 import handoff_pb2 as pb
from shoal.wire.frames import from_response, to_response
from shoal.wire.handoff_messages import Envelope
from shoal.wire.options import HANDOFF_CHANNEL_OPTIONS
from shoal.wire.peers import PeerTls, open_channel, refusal
from shoal.wire.protobuf import parse, serialize
from shoal.wire.reads import start_read
from shoal.wire.statuses import abort, from_rpc_error

_log = logging.getLogger(__name__)

_SERVICE = pb.DESCRIPTOR.services_by_name["HandoffService"].full_name
_METHOD = "Session"


async def dial(address: str, tls: PeerTls | None = None) -> Channel:
    """Prefill's end of a new stream to the decode replica at ``address`` (``host:port``).

    Returns at once: whether anybody is there, and is decode, shows at the first frame. Without ``tls`` it's plain text.
    """
    channel = open_channel(address, HANDOFF_CHANNEL_OPTIONS, tls)
    session = channel.stream_stream(
        f"/{_SERVICE}/{_METHOD}", request_serializer=None, response_deserializer=pb.SessionResponse.FromString
    )
    return _ClientEnd(address, channel, session())  # type: ignore[call-arg]


def add_handoff_service(server: grpc.aio.Server, serve: Callable[[Channel], Awaitable[None]]) -> None:
    """Let ``server`` call ``serve`` with decode's end of every stream. A ShoalError it raises is what prefill sees."""

    async def session(_: object, context: grpc.aio.ServicerContext[bytes, pb.SessionResponse]) -> None:
        await _serve(serve, context)

    handler = grpc.stream_stream_rpc_method_handler(
        session, request_deserializer=None, response_serializer=pb.SessionResponse.SerializeToString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler}),))


class _ClientEnd:
    def __init__(
        self,
        address: str,
        channel: grpc.aio.Channel,
        call: grpc.aio.StreamStreamCall[bytes, pb.SessionResponse],
    ) -> None:
        self._address = address
        self._channel = channel
        self._call = call
        self._writing: asyncio.Future[None] | None = None

    async def send(self, envelope: Envelope) -> None:
        # Apart, so that close() can end it: of a call that is cancelled before it is connected, gRPC says nothing.
        self._writing = asyncio.ensure_future(self._call.write(serialize(envelope)))
        try:
            await self._writing
        except asyncio.InvalidStateError:  # the call had ended before; how, it tells to who reads
            while True:
                await self.receive()
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
            raise self._reason(error) from error

    async def receive(self) -> Envelope:
        try:
            message = await self._call.read()
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
            raise self._reason(error) from error
        if not isinstance(message, pb.SessionResponse):  # EOF
            raise PeerGone(f"decode at {self._address} closed the stream")
        return from_response(message)

    async def close(self) -> None:
        self._call.cancel()
        if self._writing is not None:
            self._writing.cancel()
        await self._channel.close(grace=None)

    def _reason(self, error: grpc.aio.AioRpcError | asyncio.CancelledError) -> BaseException:
        """gRPC raises CancelledError also for a call that was cancelled, not only for a task."""
        if isinstance(error, asyncio.CancelledError):
            return error if _is_being_cancelled() else PeerGone(f"the stream to decode at {self._address} was closed")
        if (untrusted := refusal(error, self._address)) is not None:
            return untrusted
        known = from_rpc_error(error)
        return known if isinstance(known, HandoffError) else PeerGone(f"decode at {self._address}: {known.message}")


class _ServerEnd:
    def __init__(self, context: grpc.aio.ServicerContext[bytes, pb.SessionResponse]) -> None:
        self._context = context
        self._waiting: asyncio.Future[Any] | None = None
        self._is_closed = False

    async def send(self, envelope: Envelope) -> None:
        if self._is_closed:
            raise PeerGone("the stream is closed")
        response = to_response(envelope)
        try:
            await self._context.write(response)
        except (grpc.aio.BaseError, asyncio.InvalidStateError) as error:
            raise PeerGone("prefill ended the stream") from error

    async def receive(self) -> Envelope:
        if self._is_closed:
            raise PeerGone("the stream is closed")
        self._waiting = asyncio.shield(start_read(self._context))
        try:
            message = await self._waiting
        except grpc.aio.BaseError as error:
            raise PeerGone("prefill ended the stream") from error
        except asyncio.CancelledError as error:
            if self._is_closed and not _is_being_cancelled():
                raise PeerGone("the stream is closed") from error
            raise
        if not isinstance(message, bytes):  # EOF
            raise PeerGone("prefill closed the stream")
        return parse(message)

    async def close(self) -> None:
        self._is_closed = True
        if self._waiting is not None:
            self._waiting.cancel()


async def _serve(
    serve: Callable[[Channel], Awaitable[None]], context: grpc.aio.ServicerContext[bytes, pb.SessionResponse]
) -> None:
    end = _ServerEnd(context)
    try:
        await serve(end)
    except PeerGone:
        _log.debug("a prefill process went away", exc_info=True)
    except ShoalError as error:
        _log.warning("a prefill process was turned away: %s", error.message)
        await abort(context, error)
    finally:
        await end.close()


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
