"""Options of gRPC channels and servers. Every one that matters is written down: gRPC's defaults fit none of ours.

Left alone, a server takes messages of 4 MiB, allows one ping in five minutes and shares its port with other
processes; a channel retries by itself, goes through ``http_proxy`` and waits up to two minutes to reconnect.
"""

from __future__ import annotations

import json

Options = tuple[tuple[str, int | str], ...]

HANDOFF_MAX_MESSAGE_BYTES = 2 << 20
"""A frame's payload is at most 1 MiB; a prompt's token ids fit as well."""

KEEPALIVE_TIME_S = 10
KEEPALIVE_TIMEOUT_S = 5
"""A connection that doesn't answer a ping in this time is dead. Leases end sooner, by their missing beats."""

MIN_PING_INTERVAL_S = 5
"""What a server tolerates. Below ``KEEPALIVE_TIME_S``, or it would end the connections of its own clients."""

INITIAL_RECONNECT_S = 0.1
MAX_RECONNECT_S = 1.0

HANDOFF_CONNECT_TIMEOUT_S = 2.0
"""A handshake waits for Python at decode's end, which may be busy. After it, a prompt comes another way."""

TOKEN_CONNECT_TIMEOUT_S = 5.0
"""A stream that can't be opened ends its requests, so that is not concluded sooner than from a missing ping."""

CLIENT_MAX_MESSAGE_BYTES = 64 << 20
"""Long answers with many log-probabilities fit; what a request may have is the server's to say."""
CLIENT_CONNECT_TIMEOUT_S = 5.0
"""A handshake over the internet takes longer than one between two replicas."""
CLIENT_MAX_RECONNECT_S = 2.0

MAX_ATTEMPTS = 5
"""gRPC makes no more, whatever it is told."""
_RETRY_POLICY = {
    "initialBackoff": "0.2s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
}
# A failed attempt costs 1 token, an answered call brings tokenRatio: retries rest while half of the tokens are gone.
_RETRY_THROTTLING = {"maxTokens": 100, "tokenRatio": 0.1}


def channel_options(max_message_bytes: int, connect_timeout_s: float = INITIAL_RECONNECT_S) -> Options:
    """Options of a client's channel that sends and takes messages of up to ``max_message_bytes``.

    A connection that isn't there after ``connect_timeout_s`` is tried anew.
    """
    return (
        *_both(max_message_bytes),
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),
        # Own connections: two channels to one address would share the back-off after a peer's death.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", _ms(INITIAL_RECONNECT_S)),
        ("grpc.min_reconnect_backoff_ms", _ms(connect_timeout_s)),
        ("grpc.max_reconnect_backoff_ms", _ms(MAX_RECONNECT_S)),
    )


def client_options(service: str, max_attempts: int) -> Options:
    """Options of the SDK's channel: calls of ``service`` (full name) are attempted up to ``max_attempts`` times.

    gRPC repeats what failed with UNAVAILABLE or RESOURCE_EXHAUSTED before the server sent its headers. A name that
    no service has would mean one attempt, and no warning: take it from the descriptor. ``max_attempts`` is 1 (no
    retries) to ``MAX_ATTEMPTS``.
    """
    return (
        *_both(CLIENT_MAX_MESSAGE_BYTES),
        *_retries(service, max_attempts),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", _ms(INITIAL_RECONNECT_S)),
        # Its name notwithstanding, it is how long an attempt to connect may take.
        ("grpc.min_reconnect_backoff_ms", _ms(CLIENT_CONNECT_TIMEOUT_S)),
        ("grpc.max_reconnect_backoff_ms", _ms(CLIENT_MAX_RECONNECT_S)),
    )


def server_options(max_message_bytes: int) -> Options:
    """Options of a server that sends and takes messages of up to ``max_message_bytes``."""
    return (
        *_both(max_message_bytes),
        # Two processes on one port would each get some of the connections.
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", _ms(MIN_PING_INTERVAL_S)),
        ("grpc.http2.max_ping_strikes", 2),
    )


def _both(max_message_bytes: int) -> Options:
    return (
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", _ms(KEEPALIVE_TIME_S)),
        ("grpc.keepalive_timeout_ms", _ms(KEEPALIVE_TIMEOUT_S)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    )


def _retries(service: str, max_attempts: int) -> Options:
    if max_attempts == 1:
        return (("grpc.enable_retries", 0),)
    method = {"name": [{"service": service}], "retryPolicy": {"maxAttempts": max_attempts, **_RETRY_POLICY}}
    config = {"methodConfig": [method], "retryThrottling": _RETRY_THROTTLING}
    return (
        ("grpc.enable_retries", 1),
        ("grpc.service_config", json.dumps(config)),
        # A name server's opinion on retries would take the place of ours.
        ("grpc.service_config_disable_resolution", 1),
        # A request that gRPC doesn't keep whole can't be sent again; by default that is one of 256 KiB.
        ("grpc.per_rpc_retry_buffer_size", 2 * CLIENT_MAX_MESSAGE_BYTES),
    )


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


HANDOFF_CHANNEL_OPTIONS = channel_options(HANDOFF_MAX_MESSAGE_BYTES, HANDOFF_CONNECT_TIMEOUT_S)
TOKEN_CHANNEL_OPTIONS = channel_options(HANDOFF_MAX_MESSAGE_BYTES, TOKEN_CONNECT_TIMEOUT_S)
HANDOFF_SERVER_OPTIONS = server_options(HANDOFF_MAX_MESSAGE_BYTES)
