"""What the replicas of all three deployments have in common: where they listen, what errors of Ray's mean, and whether
they are to stop."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import structlog
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from shoal.config import AUTO, GatewayConfig, PeerTlsConfig, ShoalConfig
from shoal.errors import ConfigError, InternalError, PeerGone, ShoalError
from shoal.process.machine import EVERY_INTERFACE, is_loopback
from shoal.telemetry import CertificateMetrics, ShownTo
from shoal.wire.messages import Role
from shoal.wire.peers import PeerTls

CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Host:
    """An address to bind, and the one that other nodes reach it by."""

    bound: str
    advertised: str

    @property
    def own(self) -> str:
        """What the process that binds it reaches it by."""
        return EVERY_INTERFACE.get(self.bound, self.bound)


def host_of_this_node(configured: str, advertised: str | None = None) -> Host:
    """``auto`` is the address that the Ray cluster knows this node by; no other interface listens then."""
    if configured == AUTO:
        configured = _node_address()
    if advertised is None:
        advertised = _node_address() if configured in EVERY_INTERFACE else configured
    return Host(configured, advertised)


def host_of_handoff(config: ShoalConfig) -> Host:
    """Where this decode replica listens. Raises ConfigError where others reach it and ``tls`` isn't set."""
    host = host_of_this_node(config.handoff.host, config.handoff.advertised_host)
    if (refusal := config.refusal_to_bind(host.bound)) is not None:
        raise ConfigError(refusal)
    if config.tls == "off" and not is_loopback(host.bound):
        _log.warning(
            "tls is off: whoever reaches this address can read prompts and K/V, and hand over K/V of their own",
            address=host.bound,
        )
    return host


def leave_no_dump() -> None:
    """A process that crashes would write prompts, K/V and keys to a disk, or to whatever CORE_PATTERN names."""
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    # A program behind a pipe gets a dump at any limit but 1, and a byte is less than any file would have.
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (1, most or 1))
    except ValueError:  # the limit is 0, and only root may raise it
        if _has_dumps_piped():
            _log.warning("a crash would pipe prompts, K/V and keys to a program: make the hard limit of core 1, not 0")


def _has_dumps_piped() -> bool:
    try:
        return CORE_PATTERN.read_text().startswith("|")
    except OSError:  # not Linux, or not to be known
        return False


def host_of_metrics(config: ShoalConfig) -> Host:
    """Where this process' metrics are read: by whoever reaches it, in plain text, which is said if others do."""
    host = host_of_this_node(config.metrics.host)
    if not is_loopback(host.bound):
        _log.warning("metrics are in plain text, and open to whoever reaches this address", address=host.bound)
    return host


def host_of_gateway(config: GatewayConfig, *, serves_http: bool) -> str:
    """Where clients come in. Who else can, and who can read along, is said if others reach it.

    Where it isn't this process that ``serves_http``, Ray Serve's proxy does: on its own address, without TLS.
    """
    host, tls = config.host, config.tls
    if not serves_http and tls is not None:
        _log.warning(
            "HTTP comes by Ray Serve's proxy, in plain text and from whoever reaches it: gateway.tls is for gRPC alone"
        )
    if is_loopback(host):
        return host
    if tls is None:
        _log.warning(
            "what clients ask and are answered is in plain text: set gateway.tls, or encrypt it in front of this "
            "address",
            address=host,
        )
    if config.keys_file is None and (tls is None or tls.client_ca_file is None or not serves_http):
        _log.warning(
            "whoever reaches this address may ask: set gateway.keys_file or gateway.tls.client_ca_file"
            if serves_http
            else "whoever reaches Ray Serve's proxy may ask: set gateway.keys_file",
            address=host,
        )
    return host


def peer_tls(config: ShoalConfig, role: Role, metrics: CertificateMetrics) -> PeerTls | None:
    """This replica's certificate, if there is to be one, and its expiry among the metrics. Raises ConfigError."""
    if not isinstance(config.tls, PeerTlsConfig):
        return None
    tls = PeerTls(config.tls.folder, role)
    metrics.expires(ShownTo.REPLICAS, lambda: tls.current().expires_s)
    return tls


def known_error(error: Exception, pool: str) -> ShoalError:
    """What a failed call to ``pool`` means: its replica's own error as it was, a defect of it, or that it went away."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, ShoalError):
        return cause
    if isinstance(error, RayTaskError) and not isinstance(cause, RayError | RayServeException):
        # It lives, and would fail again: no other replica is to be tried.
        _log.error("a replica failed", exc_info=error)
        return InternalError(f"the {pool} replica failed")
    return PeerGone(f"the {pool} replica went away ({type(error).__name__})", retry_after_s=1.0)


def is_stopping() -> bool:
    """Whether Serve has told the replica of this process to stop. It says so to nobody but its own code around the
    replica, and calls that one only when all requests have ended."""
    actors: dict[Any, Any] = ray._private.worker.global_worker.actors
    return any(getattr(getattr(actor, "_replica_impl", None), "_shutting_down", False) for actor in actors.values())


@contextmanager
def told_plainly() -> Iterator[None]:
    """Ray pickles, and logs, what a replica's call ends with: an error of ours goes without what it came of, and any
    other is logged here and told as a defect."""
    try:
        yield
    except ShoalError as error:
        raise error from None
    except Exception as error:  # noqa: BLE001 - the process' edge: Ray would send the error's own text
        _log.error("a replica failed", exc_info=error)
        raise InternalError("a replica failed") from None


def _node_address() -> str:
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address
