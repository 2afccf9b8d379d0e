"""Errors to gRPC statuses and back: the one table.

The status code tells any client what to do; a ``google.rpc.Status`` in the trailing metadata tells ours the rest:
ErrorInfo (``reason`` is the error's ``code`` in capitals, so that the very class comes back), RetryInfo
(``retry_after_s``) and BadRequest (``param``). Details of defects stay here: they're for the log, not the caller.
"""

from __future__ import annotations

from typing import Any, NoReturn, cast

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from shoal import errors

Metadata = tuple[tuple[str, str | bytes], ...]

DOMAIN = "shoal"
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""What gRPC's own retry takes as the time to wait, whatever its back-off says (gRFC A6)."""
MAX_RETRY_DELAY_S = 119.0
"""Clients that are told more give up."""
MAX_MESSAGE_CHARS = 1024
"""gRPC lets 8 KiB of metadata pass, and a message travels twice in it."""

STATUS_CODES: dict[type[errors.ShoalError], grpc.StatusCode] = {
    errors.ShoalError: grpc.StatusCode.INTERNAL,
    errors.RequestError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.MissingField: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnknownField: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnsupportedValue: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ContextLengthExceeded: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.ModelNotFound: grpc.StatusCode.NOT_FOUND,
    errors.RequestTooLarge: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.RateLimited: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.PeerGone: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.InternalError: grpc.StatusCode.INTERNAL,
    errors.HandoffError: grpc.StatusCode.UNAVAILABLE,
    errors.LeaseLost: grpc.StatusCode.ABORTED,
    errors.PlanMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ChecksumMismatch: grpc.StatusCode.DATA_LOSS,
    errors.ProtocolViolation: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UntrustedPeer: grpc.StatusCode.PERMISSION_DENIED,
    errors.OutOfBlocks: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DataError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.TooLittleText: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ConfigError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ModelError: grpc.StatusCode.INTERNAL,
    errors.UnsupportedModel: grpc.StatusCode.INTERNAL,
    errors.MalformedWeights: grpc.StatusCode.INTERNAL,
    errors.ProjectorMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.CalibrationError: grpc.StatusCode.FAILED_PRECONDITION,
}

_BY_REASON: dict[str, type[errors.ShoalError]] = {kind.code.upper(): kind for kind in STATUS_CODES}

# What a bare status means: one that gRPC itself made, or a server that isn't ours.
_BY_CODE: dict[grpc.StatusCode, type[errors.ShoalError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidRequest,
    grpc.StatusCode.NOT_FOUND: errors.RequestError,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.UNAVAILABLE: errors.PeerGone,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.CANCELLED: errors.Cancelled,
    grpc.StatusCode.ABORTED: errors.LeaseLost,
    grpc.StatusCode.FAILED_PRECONDITION: errors.PlanMismatch,
    grpc.StatusCode.DATA_LOSS: errors.ChecksumMismatch,
}

_DEFAULT_RETRY_DELAY_S = 1.0
_HIDDEN = "internal error; the server's log says more"


def status_code(error: Exception) -> grpc.StatusCode:
    """The code of an error; INTERNAL for all that isn't a ShoalError."""
    return next((STATUS_CODES[kind] for kind in type(error).__mro__ if kind in STATUS_CODES), grpc.StatusCode.INTERNAL)


def to_status(error: Exception) -> Status:
    """The status with details to send for ``error``. The text of an INTERNAL error is replaced by a general one."""
    code = status_code(error)
    known = error if isinstance(error, errors.ShoalError) else errors.InternalError(_HIDDEN)
    message = _HIDDEN if code is grpc.StatusCode.INTERNAL else known.message[:MAX_MESSAGE_CHARS]
    status = Status(code=code.value[0], message=message)
    status.details.add().Pack(ErrorInfo(reason=known.code.upper(), domain=DOMAIN))
    if known.retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(round(known.retry_after_s * 1e9))
        status.details.add().Pack(RetryInfo(retry_delay=delay))
    if known.param is not None:
        violation = BadRequest.FieldViolation(field=known.param, description=message)
        status.details.add().Pack(BadRequest(field_violations=[violation]))
    return status


def from_status(status: Status) -> errors.ShoalError:
    """The error that ``status`` tells of: the class that ErrorInfo names, else what its code means alone.

    Raises DecodeError when a detail of a known kind can't be read.
    """
    info, retry, bad = ErrorInfo(), RetryInfo(), BadRequest()
    for detail in status.details:
        for part in (info, retry, bad):
            if detail.Is(part.DESCRIPTOR):
                detail.Unpack(part)
    named = _BY_REASON.get(info.reason) if info.domain == DOMAIN else None
    return (named or _of_number(status.code))(
        status.message,
        param=bad.field_violations[0].field if bad.field_violations else None,
        retry_after_s=retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None,
    )


def from_rpc_error(error: grpc.RpcError) -> errors.ShoalError:
    """The error that a call ended with. Details that can't be read, or belie the call's own code, are passed over."""
    call = cast(grpc.Call, error)  # what a call raises is an RpcError with these methods, sync and asyncio alike
    code: grpc.StatusCode = call.code()
    told = _told(call.trailing_metadata(), code.value[0])
    return told or _of_number(code.value[0])(call.details() or code.name)


def _told(metadata: Any, number: int) -> errors.ShoalError | None:
    for key, value in metadata or ():
        if key != DETAILS_KEY:
            continue
        try:
            status = Status.FromString(value)
            return from_status(status) if status.code == number else None
        except DecodeError:
            return None
    return None


def retry_delay_s(error: errors.ShoalError) -> float | None:
    """Seconds to wait before another try, at most ``MAX_RETRY_DELAY_S``; ``None`` where none would go better."""
    if error.http_status not in (429, 503):
        return None
    return _DEFAULT_RETRY_DELAY_S if error.retry_after_s is None else min(error.retry_after_s, MAX_RETRY_DELAY_S)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception, metadata: Metadata = ()) -> NoReturn:
    """End a served call with ``error``, and ``metadata`` beside it. Log an INTERNAL one before: its text isn't sent.

    Where another try may go better, the client's gRPC is told when to make it.
    """
    status = to_status(error)
    trailing: list[tuple[str, str | bytes]] = [*metadata, (DETAILS_KEY, status.SerializeToString())]
    delay_s = retry_delay_s(error) if isinstance(error, errors.ShoalError) else None
    if delay_s is not None:
        # 0 would leave the time to the client's own back-off.
        trailing.append((PUSHBACK_KEY, str(max(1, round(delay_s * 1000)))))
    await context.abort(status_code(error), status.message, trailing_metadata=tuple(trailing))


def _of_number(number: int) -> type[errors.ShoalError]:
    code = next((code for code in grpc.StatusCode if code.value[0] == number), grpc.StatusCode.UNKNOWN)
    return _BY_CODE.get(code, errors.InternalError)
