"""The outermost layer of the gRPC server, around the methods of every service, our own and gRPC's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from functools import partial
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from shoal.errors import InvalidRequest
from shoal.gateway.access import Access
from shoal.gateway.edge import as_shoal_error
from shoal.rpc.statuses import abort

Context = grpc.aio.ServicerContext[Any, Any]


class GrpcEdge(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in its stubs alone
    """Lets in whom ``access`` does, and answers every error. gRPC itself would send an unexpected one's class and text,
    also of bytes it can't read."""

    def __init__(self, access: Access) -> None:
        self._access = access

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
        return _streaming(handler, admitted) if handler.request_streaming else _unary(handler, admitted)

    def _admitted(self, method: str, context: Context) -> AbstractContextManager[None]:
        metadata = context.invocation_metadata() or ()
        shown = [value for key, value in metadata if key == "authorization" and isinstance(value, str)]
        return self._access.admitted(method, shown)


Admitted = Callable[[Context], AbstractContextManager[None]]


def _unary(handler: Any, admitted: Admitted) -> Any:
    """A method that takes one message. One that streams its answer writes it, and doesn't yield it."""
    behaviour = handler.unary_stream if handler.response_streaming else handler.unary_unary
    read = handler.request_deserializer or bytes

    async def answered(raw: bytes, context: Context) -> Any:
        async with _answering_errors(context):
            with admitted(context):
                return await behaviour(read(raw), context)

    make = grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
    return make(answered, response_serializer=handler.response_serializer)


def _streaming(handler: Any, admitted: Admitted) -> Any:
    """A method that takes a stream and yields one, as reflection does."""

    async def answered(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        async with _answering_errors(context):
            with admitted(context):
                pass  # what follows asks nothing of a pool
            async for response in handler.stream_stream(requests, context):
                yield response

    return grpc.stream_stream_rpc_method_handler(answered, handler.request_deserializer, handler.response_serializer)


@asynccontextmanager
async def _answering_errors(context: Context) -> AsyncIterator[None]:
    try:
        yield
    except grpc.aio.AbortError:
        raise  # it is answered
    except DecodeError:
        await abort(context, InvalidRequest("the message isn't one of this method: compare the client's .proto"))
    except Exception as error:  # noqa: BLE001 - the process' edge
        await abort(context, as_shoal_error(error))
