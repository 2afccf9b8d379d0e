"""Every label value a metric can have: a closed set each, so that no request can grow the series without bound."""

from __future__ import annotations

import enum


class _OpenEnum(enum.StrEnum):
    """For values that come from elsewhere (an error's code, a peer's reason): what isn't known counts as OTHER."""

    @classmethod
    def _missing_(cls, value: object) -> enum.StrEnum:
        return cls["OTHER"]


class Endpoint(_OpenEnum):
    CHAT_COMPLETIONS = "chat_completions"
    COMPLETIONS = "completions"
    DETOKENIZE = "detokenize"
    GENERATE = "generate"
    GENERATE_STREAM = "generate_stream"
    MODELS = "models"
    TOKENIZE = "tokenize"
    OTHER = "other"


class ErrorType(_OpenEnum):
    """``ShoalError.type`` of what a client was sent."""

    NONE = "none"
    INVALID_REQUEST = "invalid_request_error"
    AUTHENTICATION = "authentication_error"
    PERMISSION = "permission_error"
    RATE_LIMIT = "rate_limit_error"
    OVERLOADED = "overloaded_error"
    UNAVAILABLE = "unavailable_error"
    TIMEOUT = "timeout_error"
    CANCELLED = "cancelled_error"
    INTERNAL = "internal_error"
    OTHER = "other"


class TtftStage(enum.StrEnum):
    """What the time to the first token is made of; they add up to it."""

    GATEWAY = "gateway"
    QUEUE = "queue"
    RESERVE = "reserve"
    PREFILL = "prefill"
    TRANSFER_EXPOSED = "transfer_exposed"
    BOUNDARY_STEP = "boundary_step"


class GrantWay(enum.StrEnum):
    """How a prefill replica heard first of a prompt: by decode's session, or by its call through Serve."""

    SESSION = "session"
    CALL = "call"


class CancelStage(enum.StrEnum):
    """What a client that went away had seen."""

    WAITING = "waiting"
    STREAMING = "streaming"


class RejectReason(_OpenEnum):
    """``ShoalError.code`` of a request that was refused before anything ran."""

    INVALID = "invalid_value"
    CONTEXT_LENGTH = "context_length_exceeded"
    INVALID_KEY = "invalid_api_key"
    PERMISSION = "permission_denied"
    RATE_LIMIT = "rate_limit_exceeded"
    MODEL_NOT_FOUND = "model_not_found"
    TOO_LARGE = "request_too_large"
    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"
    OTHER = "other"


class FullDepthReason(enum.StrEnum):
    """The field that asks about the prompt itself."""

    ECHO = "echo"
    PROMPT_LOGPROBS = "prompt_logprobs"


class PromptWay(enum.StrEnum):
    """How a prompt came to its first token: over the prefill pool, or by decode alone, and why."""

    HANDED_OFF = "handed_off"
    SHORT = "short"
    FULL_DEPTH = "full_depth"
    PROMPT_LOGPROBS = "prompt_logprobs"
    CACHED = "cached"
    BUSY = "busy"
    NO_POOL = "no_pool"
    FALLBACK = "fallback"


class HandoffReason(_OpenEnum):
    """Why a hand-off failed, or was not tried."""

    NO_PREFILL = "no_prefill"
    LAST_ATTEMPT = "last_attempt"
    PREFILL_QUEUE_TIMEOUT = "prefill_queue_timeout"
    PEER_GONE = "peer_gone"
    LEASE_LOST = "lease_lost"
    PLAN_MISMATCH = "plan_mismatch"
    CHECKSUM_MISMATCH = "checksum_mismatch"
    PROTOCOL_VIOLATION = "protocol_violation"
    UNTRUSTED_PEER = "untrusted_peer"
    OVERLOADED = "overloaded"
    OUT_OF_BLOCKS = "out_of_blocks"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CANCELLED = "cancelled"
    OTHER = "other"


class FallbackRung(enum.StrEnum):
    """The ladder after a failed hand-off, from the top."""

    OTHER_REPLICA = "other_replica"
    LOCAL = "local"
    UNAVAILABLE = "unavailable"


class BlockState(enum.StrEnum):
    """Reserved blocks belong to a prompt on its way from prefill."""

    FREE = "free"
    USED = "used"
    RESERVED = "reserved"


class TokenSource(enum.StrEnum):
    COMPUTED = "computed"
    CACHED = "cached"


class Transport(enum.StrEnum):
    MEMORY = "memory"
    GRPC = "grpc"


class Part(enum.StrEnum):
    """What shipped bytes are: K/V of kept layers, projected K/V of skipped ones, or the state to project."""

    SHALLOW = "shallow"
    DEEP = "deep"
    HIDDEN = "hidden"


class VerifyCheck(_OpenEnum):
    """What decode compares before it publishes a prompt's K/V."""

    CHECKSUM = "checksum"
    TILING = "tiling"
    PROMPT_HASH = "prompt_hash"
    BOUNDARY_TOKEN = "boundary_token"
    OTHER = "other"


class LeaseState(enum.StrEnum):
    """States in which a lease holds something."""

    RESERVED = "reserved"
    STREAMING = "streaming"
    SEALED = "sealed"
    COMMITTED = "committed"
    CANCELLING = "cancelling"


class Component(enum.StrEnum):
    """What a replica consists of: threads, and servers on them."""

    EVENT_LOOP = "event_loop"
    ENGINE = "engine"
    COPY = "copy"
    NIXL = "nixl"
    TOKENIZER = "tokenizer"
    HANDOFF_SERVER = "handoff_server"
    HTTP_SERVER = "http_server"
    GRPC_SERVER = "grpc_server"
    METRICS_SERVER = "metrics_server"


class ShownTo(enum.StrEnum):
    """Who sees a certificate: Shoal's other processes that of ``tls``, clients that of ``gateway.tls``."""

    REPLICAS = "replicas"
    CLIENTS = "clients"


def status_label(status: int) -> str:
    """The HTTP statuses that Shoal answers, and ``other``."""
    return str(status) if status in _STATUSES else "other"


_STATUSES = frozenset({200, 400, 401, 403, 404, 405, 413, 429, 499, 500, 503, 504})
