"""What the replicas of all three deployments have in common: where they listen, and what errors of Ray's mean."""

from __future__ import annotations

from dataclasses import dataclass

import ray
from ray.exceptions import RayTaskError

from shoal.errors import PeerGone, ShoalError

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
    """The error that a replica of ``pool`` raised, as it was; anything of Ray's own means that it went away."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, ShoalError):
        return cause
    return PeerGone(f"the {pool} replica went away ({type(error).__name__})", retry_after_s=1.0)


def _node_address() -> str:
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address
