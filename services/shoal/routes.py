"""What this process' routers know: which replica each call went to, and where prompts that began alike went."""

from __future__ import annotations

from collections import Counter
from weakref import WeakKeyDictionary

from shoal.affinity import Affinity
from shoal.messages import Grant, Ticket

# A call is forgotten with the call itself. Serve's router writes in its thread, the replica reads in its own.
_replica_ids: WeakKeyDictionary[Grant | Ticket, str] = WeakKeyDictionary()
_NOWHERE = ""
_chosen: WeakKeyDictionary[Grant | Ticket, str] = WeakKeyDictionary()
# Of the one pool that a process sends to; read and written by Serve's router alone.
affinity = Affinity()


def choose(call: Grant | Ticket, replica_id: str) -> None:
    """It's on its way there, but may not arrive."""
    _chosen[call] = replica_id


def ended(call: Grant | Ticket) -> None:
    """Nobody answers it any more, though it may be held yet: by an error, or for a client that reads slowly."""
    # In any thread: what is there already stays where it is, whoever counts meanwhile.
    if call in _chosen:
        _chosen[call] = _NOWHERE


def num_chosen() -> Counter[str]:
    """Calls of this process that are being answered, or on their way, by replica."""
    return Counter(replica_id for replica_id in _chosen.values() if replica_id != _NOWHERE)


def note(call: Grant | Ticket, replica_id: str) -> None:
    """It arrived there."""
    _replica_ids[call] = _chosen[call] = replica_id


def replica_of(call: Grant | Ticket) -> str | None:
    """``None`` if it went nowhere yet."""
    return _replica_ids.get(call)


def num_noted() -> int:
    return len(_replica_ids)
