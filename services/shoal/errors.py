"""The error tree. Raise these, never return them.

::

    ShoalError
    ├── RequestError                  the client's request is at fault
    │   ├── InvalidRequest            400  a field is wrong; ``param`` names it
    │   │   ├── MissingField
    │   │   ├── UnknownField
    │   │   ├── UnsupportedValue           a field we know, but can't carry out unless it has its neutral value
    │   │   └── ContextLengthExceeded      prompt + max_tokens don't fit the model
    │   ├── Unauthenticated           401  no key, or one that isn't known
    │   ├── PermissionDenied          403  a key that doesn't open this
    │   ├── ModelNotFound             404
    │   └── RequestTooLarge           413
    ├── Overloaded                    429  a bounded queue is full; ``retry_after_s`` says when to come back
    │   └── RateLimited               429  a tenant asks for more than it may
    ├── Unavailable                   503  nothing can serve this now
    │   └── PeerGone                  503  the other end of a channel went away
    ├── DeadlineExceeded              504
    ├── Cancelled                     499  the client went away
    ├── InternalError                 500  a defect of ours: details are logged, not sent
    ├── HandoffError                  503  a hand-off failed; decode falls back, clients rarely see it
    │   ├── LeaseLost                      unknown, expired, consumed or taken lease; other incarnation
    │   ├── PlanMismatch                   the two sides run different plans or protocol versions
    │   ├── ChecksumMismatch               a chunk stayed corrupt or lost after one resend
    │   ├── ProtocolViolation              frames that don't tile, don't match, or break a limit
    │   └── UntrustedPeer                  a certificate of another role or authority, or one that has expired
    ├── OutOfBlocks                   503  the KV pool has no block left (the scheduler preempts)
    ├── DataError                          text to learn from or to measure on can't be used
    │   └── TooLittleText
    ├── ConfigError                        refused before anything starts
    ├── ModelError                         the model can't be loaded
    │   ├── UnsupportedModel
    │   ├── MalformedWeights
    │   └── ProjectorMismatch              a projector of another model or plan
    └── CalibrationError                   text or settings from which nothing can be learnt

``http_status`` and ``code`` are what the HTTP API answers; wire/statuses.py holds the one table to gRPC statuses.
"""

from __future__ import annotations

from typing import Any, ClassVar


class ShoalError(Exception):
    """Base of all errors that Shoal raises on purpose. Survives pickling with all its fields."""

    http_status: ClassVar[int] = 500
    type: ClassVar[str] = "internal_error"
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.param, self.retry_after_s)


def _rebuild(cls: type[ShoalError], message: str, param: str | None, retry_after_s: float | None) -> ShoalError:
    return cls(message, param=param, retry_after_s=retry_after_s)


class RequestError(ShoalError):
    http_status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class InvalidRequest(RequestError):
    code = "invalid_value"


class MissingField(InvalidRequest):
    code = "missing_field"


class UnknownField(InvalidRequest):
    code = "unknown_field"


class UnsupportedValue(InvalidRequest):
    code = "unsupported_value"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class Unauthenticated(RequestError):
    http_status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class PermissionDenied(RequestError):
    http_status = 403
    type = "permission_error"
    code = "permission_denied"


class ModelNotFound(RequestError):
    http_status = 404
    code = "model_not_found"


class RequestTooLarge(RequestError):
    http_status = 413
    code = "request_too_large"


class Overloaded(ShoalError):
    http_status = 429
    type = "overloaded_error"
    code = "overloaded"


class RateLimited(Overloaded):
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class Unavailable(ShoalError):
    http_status = 503
    type = "unavailable_error"
    code = "unavailable"


class PeerGone(Unavailable):
    code = "peer_gone"


class DeadlineExceeded(ShoalError):
    http_status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class Cancelled(ShoalError):
    http_status = 499
    type = "cancelled_error"
    code = "cancelled"


class InternalError(ShoalError):
    pass


class HandoffError(ShoalError):
    http_status = 503
    type = "unavailable_error"
    code = "handoff_failed"


class LeaseLost(HandoffError):
    code = "lease_lost"


class PlanMismatch(HandoffError):
    code = "plan_mismatch"


class ChecksumMismatch(HandoffError):
    code = "checksum_mismatch"


class ProtocolViolation(HandoffError):
    code = "protocol_violation"


class UntrustedPeer(HandoffError):
    code = "untrusted_peer"


class OutOfBlocks(ShoalError):
    http_status = 503
    type = "overloaded_error"
    code = "out_of_blocks"


class DataError(ShoalError):
    code = "data_error"


class TooLittleText(DataError):
    code = "too_little_text"


class ConfigError(ShoalError):
    code = "config_error"


class ModelError(ShoalError):
    code = "model_error"


class UnsupportedModel(ModelError):
    code = "unsupported_model"


class MalformedWeights(ModelError):
    code = "malformed_weights"


class ProjectorMismatch(ModelError):
    code = "projector_mismatch"


class CalibrationError(ShoalError):
    code = "calibration_error"
