"""Where a server listens: the first free port of a range that a firewall can be told."""

from __future__ import annotations

import errno
import socket

import grpc
import grpc.aio

from shoal.errors import ConfigError


def bind_first_free(
    server: grpc.aio.Server, host: str, first: int, last: int, credentials: grpc.ServerCredentials | None = None
) -> int:
    """Bind ``server`` to the first free port of ``first..last`` (both included) on ``host`` and return it.

    The server must have been made with ``server_options``: gRPC otherwise shares ports with other processes.
    Without ``credentials`` it speaks plain text. Raises ConfigError when all ports are taken, or ``host`` isn't
    an address of this machine.
    """
    for port in range(first, last + 1):
        if not _seems_free(host, port):
            continue
        address = join_address(host, port)
        try:
            if credentials is None:
                return server.add_insecure_port(address)
            return server.add_secure_port(address, credentials)
        except RuntimeError:
            continue  # another process was quicker
    raise ConfigError(f"no free port in {first}..{last} on {host}: free one, or widen the range in the configuration")


def join_address(host: str, port: int) -> str:
    """``host:port``, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _seems_free(host: str, port: int) -> bool:
    """Ask the system first: gRPC writes an error to stderr for each port that it finds taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            # As gRPC does: a port whose last connections are in TIME_WAIT is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            return False
        raise ConfigError(f"can't listen on {host}: {error.strerror}; name an address of this machine") from error
    return True
