"""The client SDK: ``Client`` and ``AsyncClient`` speak ``shoal.v1.InferenceService``; grpcio and protobuf suffice.

::

    with Client("127.0.0.1:9000") as client:
        for delta in client.stream("The sea is", max_tokens=32):
            print(delta.text, end="", flush=True)
"""

from shoal.client.aio import AsyncClient, AsyncStream
from shoal.client.requests import GenerateOptions, Message, Prompt
from shoal.client.sync import Client, Stream
from shoal.client.tls import Tls
from shoal.client.values import Choice, Completion, Delta, Model, Usage
from shoal.errors import (
    Cancelled,
    ConfigError,
    ContextLengthExceeded,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    OutOfBlocks,
    Overloaded,
    PeerGone,
    PermissionDenied,
    RateLimited,
    RequestError,
    RequestTooLarge,
    ShoalError,
    Unauthenticated,
    Unavailable,
)
from shoal.wire.messages import Depth, FinishReason, TokenLogprob

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "Choice",
    "Client",
    "Completion",
    "ConfigError",
    "ContextLengthExceeded",
    "DeadlineExceeded",
    "Delta",
    "Depth",
    "FinishReason",
    "GenerateOptions",
    "InternalError",
    "InvalidRequest",
    "Message",
    "Model",
    "ModelNotFound",
    "OutOfBlocks",
    "Overloaded",
    "PeerGone",
    "PermissionDenied",
    "Prompt",
    "RateLimited",
    "RequestError",
    "RequestTooLarge",
    "ShoalError",
    "Stream",
    "Tls",
    "TokenLogprob",
    "Unauthenticated",
    "Unavailable",
    "Usage",
]
