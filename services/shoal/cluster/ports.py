"""The ports that clients come in by."""

from __future__ import annotations

import errno
import random
import socket
from contextlib import suppress
from typing import Literal

from shoal.errors import ConfigError
from shoal.process.machine import EVERY_INTERFACE

Setting = Literal["port", "grpc_port"]

# Below what Linux gives away by itself, above the ranges of our other servers.
_OURS = range(24000, 32000)
_MAX_TRIES = 20


def require_free(host: str, port: int, setting: Setting = "port") -> None:
    """Raises ConfigError unless ``host:port`` can be bound: the gateway would tell, but much later."""
    _bind(host, port, setting)


def free_port(host: str) -> int:
    """A port of ``host`` that nothing listens on now; not of those that the system gives away, Ray's daemons first."""
    for port in random.sample(_OURS, _MAX_TRIES):
        with suppress(ConfigError):
            return _bind(host, port, "port")
    return _bind(host, 0, "port")


def url_of(host: str, port: int, *, is_tls: bool = False) -> str:
    """Where a client of this machine finds a server that binds ``host``."""
    reached, scheme = EVERY_INTERFACE.get(host, host), "https" if is_tls else "http"
    return f"{scheme}://[{reached}]:{port}" if ":" in reached else f"{scheme}://{reached}:{port}"


def _bind(host: str, port: int, setting: Setting) -> int:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            # Listening, too: two sockets that set SO_REUSEADDR may both bind.
            probe.listen()
            bound: int = probe.getsockname()[1]
            return bound
    except OSError as error:
        raise ConfigError(_refusal(host, port, setting, error), param=f"gateway.{setting}") from error


def _refusal(host: str, port: int, setting: Setting, error: OSError) -> str:
    ways = f"--{setting.replace('_', '-')}, gateway.{setting}"
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is taken: stop what listens there, or choose another ({ways})"
    if error.errno == errno.EACCES:
        return f"port {port} on {host} isn't ours to take: choose one above 1023 ({ways})"
    return f"can't listen on {host}:{port}: {error.strerror}; set --host (gateway.host) to an address of this machine"
