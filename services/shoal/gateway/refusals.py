"""What a client is told when it gets no answer: ``{"error": {"message", "type", "param", "code"}}``.

The errors here never leave the gateway; all others are in shoal/errors.py.
"""

from __future__ import annotations

import math
from typing import Any

from starlette.responses import JSONResponse

from shoal.errors import InternalError, InvalidRequest, RequestError, ShoalError

_DEFAULT_RETRY_AFTER_S = 1.0
_MAX_RETRY_AFTER_S = 119.0  # clients that are told more give up


class InvalidJson(InvalidRequest):
    code = "invalid_json"


class MissingField(InvalidRequest):
    code = "missing_field"


class UnknownField(InvalidRequest):
    code = "unknown_field"


class UnsupportedValue(InvalidRequest):
    """A field we know, but can't carry out unless it has its neutral value."""

    code = "unsupported_value"


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
    if error.http_status in (429, 503):
        seconds = _DEFAULT_RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        headers["retry-after"] = str(math.ceil(min(max(seconds, 1.0), _MAX_RETRY_AFTER_S)))
    return JSONResponse(error_document(error), status_code=error.http_status, headers=headers)
