"""The outermost layer of the HTTP API: a request's id, and an answer to every error.

Also what it takes to know that a client went away: an answer is worked on only as long as someone waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.api.json_size import JsonSize
from shoal.api.refusals import error_response
from shoal.errors import Cancelled, InternalError, PeerGone, PlanMismatch, RequestTooLarge, ShoalError
from shoal.telemetry import bind_request

_log = logging.getLogger(__name__)

T = TypeVar("T")

REQUEST_ID = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_LENGTH = re.compile(r"[0-9]{1,19}")
"""A longer number isn't looked at: Python refuses to read one of thousands of digits, and what comes is counted."""
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")

# A client that sent a little too much should get to read why; one that sends for ever should not be listened to.
_MAX_DISCARDED_BODIES = 8
_POLICY_VIOLATION = 1008


class RequestEdge:
    """ASGI middleware. Every answer carries ``x-request-id``: the client's own if it's a sane one, else a new one."""

    def __init__(self, app: ASGIApp, *, proxy_echoes_id: bool = False) -> None:
        self._app = app
        self._proxy_echoes_id = proxy_echoes_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # nothing here speaks it
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        asked = headers.get(REQUEST_ID, "")
        request_id = sane_request_id(asked)
        scope["shoal.request_id"] = request_id
        has_started = False
        # Serve's proxy gives every request an id, and puts it into every answer: once is enough.
        is_echoed = self._proxy_echoes_id and request_id == asked

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                if not is_echoed:
                    MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        with bind_request(request_id, traceparent_of(headers)):
            try:
                await self._app(scope, receive, send_with_id)
            except Exception as error:  # noqa: BLE001 - the process' edge: no defect may end the server
                known = as_shoal_error(error)
                # An answer that has begun can't be taken back: its end says what happened.
                if not has_started and not isinstance(known, Cancelled):
                    await error_response(known)(scope, receive, send_with_id)


def as_shoal_error(error: Exception) -> ShoalError:
    """What a client is told: the error itself if we raised it on purpose, unless it's of no use to clients; anything
    else is a defect, which is logged here."""
    if isinstance(error, PlanMismatch):
        # Clients know of no plans, and gRPC's own retry passes over a failed precondition.
        return PeerGone(error.message, retry_after_s=error.retry_after_s)
    if isinstance(error, ShoalError):
        return error
    _log.error("a request failed", exc_info=error)
    return InternalError(f"{type(error).__name__}")


def request_id_of(scope: Scope) -> str:
    value: str = scope["shoal.request_id"]
    return value


def sane_request_id(asked: str) -> str:
    """The id that a client asked for if it's a sane one, else a new one."""
    return asked if _REQUEST_ID.fullmatch(asked) else secrets.token_hex(16)


def traceparent_of(headers: Mapping[str, str]) -> str | None:
    """The W3C trace context that a client sent, if it is one."""
    value = headers.get("traceparent", "")
    return value if _TRACEPARENT.fullmatch(value) else None


def declared_bytes(headers: Headers) -> int | None:
    """How long the body is to be, if the client says so."""
    declared = headers.get("content-length", "")
    return int(declared) if _LENGTH.fullmatch(declared) else None


async def read_body(headers: Headers, receive: Receive, max_bytes: int, size: JsonSize) -> bytes:
    """The request's body. Raises RequestTooLarge beyond ``max_bytes`` or what ``size`` allows, Cancelled if the client
    leaves meanwhile."""
    too_large = RequestTooLarge(f"the body has more than {max_bytes} bytes: send less text in one request")
    if (declared_bytes(headers) or 0) > max_bytes * _MAX_DISCARDED_BODIES:
        raise too_large
    body, num_bytes, more = bytearray(), 0, True
    while more and num_bytes <= max_bytes * _MAX_DISCARDED_BODIES:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Cancelled("the client went away while it sent its request")
        piece: bytes = message.get("body", b"")
        num_bytes += len(piece)
        if num_bytes <= max_bytes and size.refusal is None:
            size.add(piece)
            body += piece
        more = message.get("more_body", False)
    if num_bytes > max_bytes:
        raise too_large
    if size.refusal is not None:
        raise size.refusal
    return bytes(body)


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``. Raises Cancelled if the client goes away first; ``work`` has then ended, too.

    The request's body must have been read: what comes next from ``receive`` is the disconnect.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Cancelled("the client went away")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
