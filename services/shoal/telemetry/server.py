"""The port a process' metrics are read from, and how Prometheus finds all of them."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server

from shoal.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Target:
    """One process to scrape: ``address`` is ``host:port``, ``role`` is gateway, prefill or decode."""

    address: str
    role: str
    replica_id: str


class MetricsServer:
    """Serves one registry until ``close``."""

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server = server
        self._thread = thread
        self.port: int = server.server_port
        self._closed = False

    @property
    def is_serving(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """Free the port. Twice is a no-op."""
        if not self._closed:
            self._closed = True
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()


def serve_metrics(
    registry: CollectorRegistry, host: str = "127.0.0.1", first_port: int = 22000, last_port: int = 22999
) -> MetricsServer:
    """Serve ``registry`` over HTTP on the first free port of ``first_port..last_port`` (both included).

    Raises ConfigError if all are taken, or ``host`` isn't an address of this machine.
    """
    for port in range(first_port, last_port + 1):
        try:
            server, thread = start_http_server(port, host, registry)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                continue
            raise ConfigError(
                f"can't serve metrics on {host}: {error.strerror}; set metrics.host to an address of this machine"
            ) from error
        return MetricsServer(server, thread)
    raise ConfigError(
        f"no free port for metrics in {first_port}..{last_port} on {host}: free one, or widen metrics.port_range"
    )


def targets_document(targets: Iterable[Target]) -> list[dict[str, list[str] | dict[str, str]]]:
    """What Prometheus' HTTP service discovery reads: one entry a process, sorted, with its role and replica."""
    ordered = sorted(targets, key=lambda target: (target.role, target.replica_id, target.address))
    return [
        {"targets": [target.address], "labels": {"role": target.role, "replica": target.replica_id}}
        for target in ordered
    ]
