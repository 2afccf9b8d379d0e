"""What the replicas of all three deployments have in common: where they listen, and what errors of Ray's mean."""

from __future__ import annotations

from dataclasses import dataclass

import ray
import structlog
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from shoal.errors import InternalError, PeerGone, ShoalError

_log = structlog.get_logger(__name__)

AUTO = "auto"
_EVERY_INTERFACE = frozenset({"", "0.0.0.0", "::"})  # noqa: S104 - nothing is bound here


@dataclass(frozen=True, slots=True)
class Host:
    """An address to bind, and the one that other nodes reach it by."""

    bound: str
    advertised: str


def host_of_this_node(configured: str, advertised: str | None = None) -> Host:
    """``auto`` is the address that the Ray cluster knows this node by; no other interface listens then."""
    if configured == AUTO:
        configured = _node_address()
    if advertised is None:
        advertised = _node_address() if configured in _EVERY_INTERFACE else configured
    return Host(configured, advertised)


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


def _node_address() -> str:
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address
