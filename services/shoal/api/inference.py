"""``shoal.v1.InferenceService``: one gRPC call from its bytes to its last message.

::

    place ─> bytes ─> body ─> limits ─> token ids ─> requests ─> first output ─┬─> stream of messages
                                                                                └─> one message, at the end

As for HTTP, nothing is sent before the first output. gRPC clients retry until they see response headers, so a call
that fails before it is answered by trailers alone, and one that fails later has failed for good.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any

import grpc
import grpc.aio

from shoal.api.access import asking
from shoal.api.deadline import done_within
from shoal.api.edge import REQUEST_ID, as_shoal_error
from shoal.api.exchange import Exchange
from shoal.api.generation import Generation
from shoal.api.grpc_edge import Context, ids_of, read_message
from shoal.api.intake import Services, enter, take_in
from shoal.api.protobuf import InferenceAnswer, in_grpc_words, models_response, read_request, to_body
from shoal.api.validation import find_model
from shoal.errors import Cancelled, DeadlineExceeded, InvalidRequest, RequestTooLarge
from shoal.telemetry import bind_request
from shoal.v1 import inference_pb2 as pb
from shoal.wire.statuses import abort

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name

_MAX_ROUNDING = 0.02


class InferenceService:
    """Answers calls with what ``services`` generate. It reads messages itself, as no error of that may get out."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def add_to(self, server: grpc.aio.Server) -> None:
        # What generates reads its one message for itself, once it has a place.
        handlers = {
            "Generate": grpc.stream_unary_rpc_method_handler(
                self._generate, response_serializer=pb.GenerateResponse.SerializeToString
            ),
            "GenerateStream": grpc.stream_stream_rpc_method_handler(
                self._generate_stream, response_serializer=pb.GenerateStreamResponse.SerializeToString
            ),
            "ListModels": grpc.unary_unary_rpc_method_handler(
                self._list_models, response_serializer=pb.ListModelsResponse.SerializeToString
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))

    async def _generate(self, _messages: Any, context: Context) -> pb.GenerateResponse:
        async with self._answering("generate", context) as answer:
            response = await answer.whole()
            await _send_headers(context, answer)
            return response

    async def _generate_stream(self, _messages: Any, context: Context) -> None:
        # Messages are written, not yielded: a generator that gRPC no longer reads would be closed late.
        async with self._answering("generate_stream", context) as answer, aclosing(answer.messages()) as messages:
            first = await anext(messages)
            await _send_headers(context, answer)
            await _send(context, first)
            async for message in messages:
                await _send(context, message)

    async def _list_models(self, _raw: bytes, _context: Context) -> pb.ListModelsResponse:
        return models_response(self._services.models)

    @asynccontextmanager
    async def _answering(self, endpoint: str, context: Context) -> AsyncIterator[InferenceAnswer]:
        """The answer to what comes, while it's being made. Whatever goes wrong ends the call with its status."""
        request_id, traceparent = ids_of(context)
        timeout_s = context.time_remaining()
        with bind_request(request_id, traceparent):
            try:
                with Exchange(endpoint, self._services.observer, self._services.clock) as exchange:
                    enter(self._services, exchange)
                    async with done_within(self._services.config.deadline_s):  # the client's own, gRPC keeps
                        try:
                            generation = await self._begin(context, exchange, request_id, traceparent, timeout_s)
                            yield InferenceAnswer(generation, exchange.model, request_id)
                        except (asyncio.CancelledError, Cancelled):
                            if _is_late(context, timeout_s):
                                exchange.failed(DeadlineExceeded("the client's deadline has passed"))
                            raise
            except Exception as error:  # noqa: BLE001 - the process' edge: gRPC would send the error's own text
                await abort(context, as_shoal_error(error), ((REQUEST_ID, request_id),))

    async def _begin(
        self,
        context: Context,
        exchange: Exchange,
        request_id: str,
        traceparent: str | None,
        timeout_s: float | None,
    ) -> Generation:
        services, max_bytes = self._services, self._services.config.max_body_bytes
        async with services.bodies.turn(asking()):
            raw = await read_message(context)
        if len(raw) > max_bytes:
            raise RequestTooLarge(f"the message has more than {max_bytes} bytes: send less text in one request")
        exchange.exits.enter_context(services.bodies.held(asking(), len(raw)))
        request = read_request(raw)
        exchange.model = request.model or services.models[0].name
        model = find_model(services.models, exchange.model)
        try:
            return await take_in(
                to_body(request, model, services.config),
                services,
                exchange,
                request_id=request_id,
                traceparent=traceparent,
                timeout_s=timeout_s,
            )
        except InvalidRequest as error:
            raise in_grpc_words(error, request) from None


def _is_late(context: Context, timeout_s: float | None) -> bool:
    """Whether a call of ``timeout_s`` that was ended is one whose deadline passed.

    The client's gRPC ends it by the client's clock, and has told the server a time rounded up, by up to a hundredth.
    """
    return timeout_s is not None and context.time_remaining() <= _MAX_ROUNDING * timeout_s


async def _send_headers(context: Context, answer: InferenceAnswer) -> None:
    with _unless_gone():
        await context.send_initial_metadata(((REQUEST_ID, answer.request_id),))


async def _send(context: Context, message: pb.GenerateStreamResponse) -> None:
    with _unless_gone():
        await context.write(message)


@contextmanager
def _unless_gone() -> Iterator[None]:
    """A connection that breaks may be noticed here before gRPC cancels the call."""
    try:
        yield
    except (grpc.aio.BaseError, asyncio.InvalidStateError) as error:
        raise Cancelled("the client went away") from error
