"""What this process' routers know: which replica each call went to, and where prompts that began alike went."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from shoal.affinity import Affinity
from shoal.messages import Grant, Ticket

# A call is forgotten with the call itself. Serve's router writes in its thread, the replica reads in its own.
_replica_ids: WeakKeyDictionary[Grant | Ticket, str] = WeakKeyDictionary()
# Of the one pool that a process sends to; read and written by Serve's router alone.
affinity = Affinity()


def note(call: Grant | Ticket, replica_id: str) -> None:
    _replica_ids[call] = replica_id


def replica_of(call: Grant | Ticket) -> str | None:
    """``None`` if it went nowhere yet."""
    return _replica_ids.get(call)


def num_noted() -> int:
    return len(_replica_ids)
