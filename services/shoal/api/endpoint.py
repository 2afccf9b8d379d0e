"""What is POSTed: one HTTP request from its body to its last byte. The endpoints that generate are here, too.

::

    place ─> body ─> schema ─> limits ─> token ids ─> requests ─> first output ─┬─> stream of chunks
                                                                                └─> one body, at the end

Nothing is sent before the first output, so whatever goes wrong until then is a proper HTTP status.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import aclosing
from typing import Generic, TypeVar

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from shoal.api.access import asking
from shoal.api.answers import Answer, AnswerFormat, ChatFormat, CompletionFormat, error_event, stream_end
from shoal.api.deadline import done_within
from shoal.api.edge import (
    as_shoal_error,
    declared_bytes,
    read_body,
    request_id_of,
    traceparent_of,
    unless_disconnected,
)
from shoal.api.exchange import Exchange
from shoal.api.intake import Services, enter, take_in
from shoal.api.json_size import JsonSize
from shoal.api.schema import ChatBody, CompletionBody, parse
from shoal.api.tokenizer import Tokenizer
from shoal.errors import InvalidRequest, ShoalError
from shoal.wire.messages import Depth

DEPTH_HEADER = "x-shoal-depth"
TIMING_HEADER = "x-shoal-timing"
TIMEOUT_HEADER = "x-shoal-timeout"

BODY_S = 10.0
"""How long a client may take to send its request's body: it has a place meanwhile, which others wait for."""
SLOWEST_BYTES_PER_S = 256 << 10
"""So much longer may a long body take, which has memory, too."""
_SECONDS = re.compile(r"([0-9]+(\.[0-9]+)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
"""As clients' languages write a number. Python's float would also read 1_0, infinity and white space of Latin-1."""

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # or nginx would collect the tokens
]

B = TypeVar("B", CompletionBody, ChatBody)


class Endpoint(ABC):
    """An ASGI application for one route. ``name`` is the metrics' label."""

    def __init__(self, name: str, services: Services) -> None:
        self._name = name
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        services, headers = self._services, Headers(scope=scope)
        with Exchange(self._name, services.observer, services.clock) as exchange:
            enter(services, exchange)
            async with done_within(_patience_s(headers, services.config.deadline_s)):
                raw = await self._read(headers, receive)
                exchange.exits.enter_context(services.bodies.held(asking(), len(raw)))
                rest = await unless_disconnected(receive, self._answer(scope, raw, send, exchange))
                # All is generated: from here on, a client that hangs up has merely stopped listening.
                await rest(scope, receive, send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        config, declared = self._services.config, declared_bytes(headers)
        num_bytes = config.max_body_bytes if declared is None else min(declared, config.max_body_bytes)
        with self._services.bodies.held(asking(), num_bytes):
            async with done_within(BODY_S + num_bytes / SLOWEST_BYTES_PER_S):
                return await read_body(headers, receive, config.max_body_bytes, JsonSize(config))

    @abstractmethod
    async def _answer(self, scope: Scope, raw: bytes, send: Send, exchange: Exchange) -> ASGIApp:
        """Everything that takes time; what is left to send comes back."""


class Generating(Endpoint, Generic[B]):
    """One that generates."""

    def __init__(
        self, name: str, kind: type[B], answer_format: Callable[[B, Tokenizer], AnswerFormat], services: Services
    ) -> None:
        super().__init__(name, services)
        self._kind: type[B] = kind
        self._format: Callable[[B, Tokenizer], AnswerFormat] = answer_format

    async def _answer(self, scope: Scope, raw: bytes, send: Send, exchange: Exchange) -> ASGIApp:
        answer = await self._prepare(scope, raw, exchange)
        if answer.body.stream:
            return _last_event(await _send_stream(answer, send, exchange))
        return JSONResponse(await answer.whole())

    async def _prepare(self, scope: Scope, raw: bytes, exchange: Exchange) -> Answer:
        """Everything that can be refused before a pool hears of the request."""
        headers, request_id = Headers(scope=scope), request_id_of(scope)
        body = _with_depth_header(parse(self._kind, raw), headers)
        generation = await take_in(
            body,
            self._services,
            exchange,
            request_id=request_id,
            traceparent=traceparent_of(headers),
            timeout_s=timeout_of(headers),
        )
        wants_timing = headers.get(TIMING_HEADER) == "1"
        answer_format = self._format(body, self._services.tokenizer)
        return Answer(answer_format, body, generation, request_id, wants_timing=wants_timing)


def completions(services: Services) -> Generating[CompletionBody]:
    """POST /v1/completions"""
    return Generating("completions", CompletionBody, CompletionFormat, services)


def chat_completions(services: Services) -> Generating[ChatBody]:
    """POST /v1/chat/completions"""
    return Generating("chat_completions", ChatBody, ChatFormat, services)


async def _send_stream(answer: Answer, send: Send, exchange: Exchange) -> bytes:
    """Server-sent events, all but the last, which is returned: an error, or else the usual end."""
    async with aclosing(answer.events()) as events:
        first = await anext(events)
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        await _send_event(send, first)
        try:
            async for event in events:
                await _send_event(send, event)
        except Exception as error:  # noqa: BLE001 - the process' edge: the status is sent, so the stream says it
            known = as_shoal_error(error)
            exchange.failed(error if isinstance(error, ShoalError) else known)  # the log says what really was
            return error_event(known)
    return stream_end()


async def _send_event(send: Send, event: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": event, "more_body": more})


def _last_event(event: bytes) -> ASGIApp:
    async def send_last(_scope: Scope, _receive: Receive, send: Send) -> None:
        await _send_event(send, event, more=False)

    return send_last


def _with_depth_header(body: B, headers: Headers) -> B:
    """The header is for clients that can't add a field; the field wins."""
    value = headers.get(DEPTH_HEADER)
    if value is None:
        return body
    try:
        depth = Depth(value)
    except ValueError:
        raise InvalidRequest(f"{DEPTH_HEADER}: must be auto, shallow or full", param=DEPTH_HEADER) from None
    return body if body.depth is not None else body.model_copy(update={"depth": depth})


def timeout_of(headers: Headers) -> float | None:
    """Seconds that the client waits, if it says so. Raises InvalidRequest. gRPC has its own way to."""
    value = headers.get(TIMEOUT_HEADER)
    if value is None:
        return None
    timeout_s = float(value) if _SECONDS.fullmatch(value) else math.nan
    if not 0 < timeout_s < math.inf:
        raise InvalidRequest(f"{TIMEOUT_HEADER}: must be seconds, more than 0, as 30 or 2.5", param=TIMEOUT_HEADER)
    return timeout_s


def _patience_s(headers: Headers, most_s: float) -> float:
    """The same, or ``most_s`` if that is less; what is no number is told once the request is here."""
    try:
        timeout_s = timeout_of(headers)
    except InvalidRequest:
        timeout_s = None
    return most_s if timeout_s is None else min(timeout_s, most_s)
