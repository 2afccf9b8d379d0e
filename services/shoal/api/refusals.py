"""What a client is told when it gets no answer: ``{"error": {"message", "type", "param", "code"}}``.

The errors here are HTTP's alone; all others are in shoal/errors.py.
"""

from __future__ import annotations

import math
from typing import Any

from starlette.responses import JSONResponse

from shoal.errors import DeadlineExceeded, InternalError, InvalidRequest, RequestError, ShoalError, Unauthenticated
from shoal.errors import UnsupportedValue as UnsupportedValue  # noqa: PLC0414 - it was defined here
from shoal.wire.statuses import retry_delay_s


class InvalidJson(InvalidRequest):
    code = "invalid_json"


class RouteNotFound(RequestError):
    http_status = 404
    code = "not_found"


class MethodNotAllowed(RequestError):
    http_status = 405
    code = "method_not_allowed"


def error_document(error: ShoalError) -> dict[str, Any]:
    """The body of an error answer, and the last chunk of a stream that failed. Our own defects keep their details."""
    is_defect = error.http_status == InternalError.http_status
    message = "the server failed on this request; its log says more" if is_defect else error.message
    return {"error": {"message": message, "type": error.type, "param": error.param, "code": error.code}}


def error_response(error: ShoalError, headers: dict[str, str] | None = None) -> JSONResponse:
    """``error`` as an HTTP answer; with Retry-After where a later try may succeed."""
    headers = dict(headers or {})
    delay_s = retry_delay_s(error)
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, DeadlineExceeded):
        headers["x-should-retry"] = "false"  # OpenAI's clients would ask twice more, and nobody waits any longer
    if delay_s is not None:
        headers["retry-after"] = str(math.ceil(max(delay_s, 1.0)))
    return JSONResponse(error_document(error), status_code=error.http_status, headers=headers)
