"""Where a client calls, and what goes with each call: everything that isn't I/O, for both clients."""

from __future__ import annotations

import ipaddress
import math
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event
from typing import Any, TypeVar, cast

import grpc

from shoal.client.tls import Tls
from shoal.errors import (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    PeerGone,
    RequestTooLarge,
    ShoalError,
    Unavailable,
)
from shoal.v1 import inference_pb2 as pb
from shoal.wire.options import MAX_ATTEMPTS, client_options
from shoal.wire.statuses import DETAILS_KEY, from_rpc_error

DEFAULT_TARGET = "127.0.0.1:9000"
DEFAULT_TIMEOUT_S = 600.0
DEFAULT_MAX_ATTEMPTS = 4

HEALTH_METHOD = "/grpc.health.v1.Health/Check"
HEALTH_REQUEST = b""
HEALTH_SERVING = b"\x08\x01"
"""Bytes of a HealthCheckRequest for the whole server and of an answer SERVING: too little for a dependency."""

_MAX_TIMEOUT_S = 365 * 24 * 3600.0
"""gRPC takes a deadline that is centuries away for one that has passed."""

_SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_API_KEY = re.compile(r"[!-~]+")

_Channel = TypeVar("_Channel")


@dataclass(frozen=True, slots=True)
class Call:
    """One call's deadline and metadata, and how its failures read."""

    target: str
    timeout_s: float
    request_id: str
    metadata: tuple[tuple[str, str], ...] = field(repr=False)

    @contextmanager
    def typed_errors(self) -> Iterator[None]:
        """Raises what gRPC raises as the ShoalError that it stands for."""
        try:
            yield
        except grpc.RpcError as error:
            known = self._known(error)
            known.add_note(f"request id: {self.request_id}")
            raise known from error

    def _known(self, error: grpc.RpcError) -> ShoalError:
        ended = cast(grpc.Call, error)
        if any(key == DETAILS_KEY for key, _ in ended.trailing_metadata() or ()):
            return from_rpc_error(error)  # a server of ours said it
        details = ended.details() or ""
        match ended.code():
            case grpc.StatusCode.UNAVAILABLE:
                return PeerGone(
                    f"{self.target} can't be reached, or went away ({details}): check that it runs, that this is "
                    "its gRPC port (9000, not HTTP's 8000), and that both sides speak TLS or neither does"
                )
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return DeadlineExceeded(
                    f"{self.target} didn't finish within {self.timeout_s:g} s: raise timeout_s, or lower max_tokens"
                )
            case grpc.StatusCode.UNIMPLEMENTED:
                return Unavailable(f"{self.target} doesn't serve {_SERVICE}: check the address ({details})")
            case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in details:
                return RequestTooLarge(f"a message is above the limit: {details}")
        return from_rpc_error(error)


@dataclass(frozen=True, slots=True)
class Connection:
    """A server's address, and how to speak with it. Raises ConfigError for what can't work or would leak the key."""

    target: str
    timeout_s: float
    tls: Tls | None
    api_key: str | None = field(repr=False)
    allow_plain_text_key: bool
    max_attempts: int
    closed: Event = field(default_factory=Event, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.target or self.target.startswith(("http:", "https:")):
            raise ConfigError(f"the target must be host:port, such as {DEFAULT_TARGET}, not {self.target!r}")
        if not _is_timeout(self.timeout_s):
            raise ConfigError(f"timeout_s must be a number of seconds above 0, not {self.timeout_s}")
        if not _is_num_attempts(self.max_attempts):
            raise ConfigError(f"max_attempts must be a whole number, 1 to {MAX_ATTEMPTS}: gRPC makes no more")
        if self.api_key is not None:
            self._check_key(self.api_key)

    def _check_key(self, key: str) -> None:
        if not _API_KEY.fullmatch(key):
            raise ConfigError("api_key must be printable ASCII without spaces: is there a line break at its end?")
        if self.tls is None and not self.allow_plain_text_key and not is_loopback(self.target):
            raise ConfigError(
                f"the API key would travel to {self.target} in plain text: set tls=Tls(…), or "
                "allow_plain_text_key=True if something else encrypts the way there"
            )

    def dial(self, insecure: Callable[..., _Channel], secure: Callable[..., _Channel]) -> _Channel:
        """A channel made by one of grpc's or grpc.aio's two functions."""
        options = client_options(_SERVICE, self.max_attempts)
        if self.tls is None:
            return insecure(self.target, options=options)
        return secure(self.target, self.tls.credentials(), options=options)

    def call(self, timeout_s: float | None = None, request_id: str | None = None) -> Call:
        """The terms of a new call. Raises InvalidRequest for a deadline or an id that can't be sent, Cancelled once the
        connection is closed."""
        if self.closed.is_set():
            raise Cancelled("this client is closed: make another one")
        if timeout_s is not None and not _is_timeout(timeout_s):
            raise InvalidRequest(f"timeout_s must be above 0, not {timeout_s}", param="timeout_s")
        if request_id is not None and not _REQUEST_ID.fullmatch(request_id):
            raise InvalidRequest(f"request_id must match {_REQUEST_ID.pattern}", param="request_id")
        request_id = request_id or secrets.token_hex(16)
        metadata = [("x-request-id", request_id)]
        if self.api_key is not None:
            metadata.append(("authorization", f"Bearer {self.api_key}"))
        return Call(self.target, min(timeout_s or self.timeout_s, _MAX_TIMEOUT_S), request_id, tuple(metadata))


def is_loopback(target: str) -> bool:
    """Whether what is sent to ``target`` (a gRPC name) stays on this machine; ``False`` where that isn't plain."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    address = re.sub(r"^(dns:(///)?|ipv4:|ipv6:)", "", target)
    found = re.fullmatch(r"\[([^\]]+)\](?::\d+)?|([^:/]+)(?::\d+)?", address)
    if found is None:
        return False
    host = found[1] or found[2]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_num_attempts(value: Any) -> bool:
    return isinstance(value, int) and 1 <= value <= MAX_ATTEMPTS


def _is_timeout(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 < value < math.inf
