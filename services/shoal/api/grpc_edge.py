"""The outermost layer of the gRPC server, around the methods of every service, our own and gRPC's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from functools import partial
from inspect import isasyncgenfunction
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from shoal.api.access import OPEN, Access, asking
from shoal.api.backend import GatewayObserver
from shoal.api.bodies import Bodies
from shoal.api.edge import REQUEST_ID, as_shoal_error, sane_request_id, traceparent_of
from shoal.api.peers import PeerCalls
from shoal.errors import Cancelled, DeadlineExceeded, InvalidRequest, Overloaded
from shoal.telemetry import bind_request
from shoal.wire.reads import start_read
from shoal.wire.statuses import abort

Context = grpc.aio.ServicerContext[Any, Any]


MESSAGE_S = 30.0
"""How long a client may take to send its message: gRPC itself would wait for as long as it likes."""

PROBE_S = 5.0
"""The same for a probe, whose message has a few bytes, and who needs no key."""

_MAX_PROBES = 8
"""So many messages of probes may be coming from one address at once."""


class GrpcEdge(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in its stubs alone
    """Lets in whom ``access`` does, before a byte of a message is read, and answers every error. gRPC itself would send
    an unexpected one's class and text, also of bytes it can't read."""

    def __init__(self, access: Access, bodies: Bodies, observer: GatewayObserver) -> None:
        self._access = access
        self._bodies = bodies
        self._observer = observer
        self._probes = PeerCalls(_MAX_PROBES)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # there is no such method, and gRPC says so
        method: str = handler_call_details.method
        admitted = partial(self._admitted, method)
        if not handler.request_streaming:
            return _unary(handler, admitted, self._reader(method, handler))
        behaviour = handler.stream_stream if handler.response_streaming else handler.stream_unary
        if isasyncgenfunction(behaviour):
            return _yielding(handler, admitted)
        return _as_stream(handler, behaviour, admitted)

    @contextmanager
    def _admitted(self, method: str, context: Context) -> Iterator[None]:
        metadata = context.invocation_metadata() or ()
        shown = [value for key, value in metadata if key == "authorization" and isinstance(value, str)]
        with self._access.admitted(method, shown, context.peer()):
            try:
                yield
            except Overloaded as error:  # of a call that takes no place, and so has no Exchange to count it
                self._observer.rejected(error.code)
                raise

    def _reader(self, method: str, handler: Any) -> Callable[[Context], Awaitable[Any]]:
        """How the message of a call is read. Where keys are wanted, none comes before its key: what needs no key gets
        the answer to an empty message."""
        if method not in OPEN:
            return self._read_in_turn
        if not self._access.wants_keys:
            return self._read_probe

        async def unread(_context: Context) -> Any:
            return handler.request_deserializer(b"")

        return unread

    async def _read_in_turn(self, context: Context) -> Any:
        async with self._bodies.turn(asking()):
            return await read_message(context)

    async def _read_probe(self, context: Context) -> Any:
        with self._probes.counted(context.peer()):
            return await read_message(context, PROBE_S)


Admitted = Callable[[Context], AbstractContextManager[None]]


async def read_message(context: Context, within_s: float | None = None) -> Any:
    """The one message of a call. Raises DeadlineExceeded if it doesn't come, Cancelled if there is none."""
    reading = start_read(context)
    await asyncio.wait((reading,), timeout=MESSAGE_S if within_s is None else within_s)
    if not reading.done():
        raise DeadlineExceeded("the message didn't come to its end in time")
    message = reading.result()
    if message is grpc.aio.EOF:  # type: ignore[attr-defined]  # its stubs don't know it
        raise Cancelled("the client went away while it sent its message")
    return message


def _unary(handler: Any, admitted: Admitted, read: Callable[[Context], Awaitable[Any]]) -> Any:
    """A method that takes one message. One that streams its answer writes it, and doesn't yield it."""
    behaviour = handler.unary_stream if handler.response_streaming else handler.unary_unary

    async def of_stream(_messages: Any, context: Context) -> Any:
        return await behaviour(await read(context), context)

    return _as_stream(handler, of_stream, admitted)


def _as_stream(handler: Any, behaviour: Callable[[Any, Context], Awaitable[Any]], admitted: Admitted) -> Any:
    """A method that reads for itself. The wire is the same; of one message alone, gRPC would have read all before."""

    async def answered(messages: Any, context: Context) -> Any:
        request_id, traceparent = ids_of(context)
        async with _answering_errors(context, request_id, traceparent):
            with bind_request(request_id, traceparent), admitted(context):
                return await behaviour(messages, context)

    make = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
    return make(answered, handler.request_deserializer, handler.response_serializer)


def _yielding(handler: Any, admitted: Admitted) -> Any:
    """A method that takes a stream and yields one, as reflection does."""

    async def answered(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        request_id, traceparent = ids_of(context)
        async with _answering_errors(context, request_id, traceparent):
            with bind_request(request_id, traceparent), admitted(context):
                pass  # what follows asks nothing of a pool
            async for response in handler.stream_stream(requests, context):
                yield response

    return grpc.stream_stream_rpc_method_handler(answered, handler.request_deserializer, handler.response_serializer)


@asynccontextmanager
async def _answering_errors(context: Context, request_id: str, traceparent: str | None) -> AsyncIterator[None]:
    told = ((REQUEST_ID, request_id),)
    try:
        yield
    except grpc.aio.AbortError:
        raise  # it is answered
    except DecodeError:
        unreadable = InvalidRequest("the message isn't one of this method: compare the client's .proto")
        await abort(context, unreadable, told)
    except Exception as error:  # noqa: BLE001 - the process' edge
        with bind_request(request_id, traceparent):
            known = as_shoal_error(error)
        await abort(context, known, told)


def ids_of(context: Context) -> tuple[str, str | None]:
    """A call's id, as HTTP's: its client's own if it's a sane one, else a new one; and its trace, if it has one."""
    metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
    return sane_request_id(metadata.get(REQUEST_ID, "")), traceparent_of(metadata)
