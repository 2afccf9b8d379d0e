"""What this process' routers know: which replica each call went to, and where prompts that began alike went."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from weakref import WeakKeyDictionary, WeakSet

from shoal.affinity import Affinity
from shoal.messages import Grant, Ticket

PATIENCE_S = 0.3
"""Within it, a replica that lives takes a call, or says that it won't, also on a machine that is busy."""

HEARD_WITHIN_S, FIRST_WITHIN_S = 2.0, 10.0
"""A replica that nothing was heard of for so long, though a call waits there, or where one waits for its first answer
for so long, may hang, or have no memory left: it gets no more than its part."""

# A call is forgotten with the call itself. Serve's router writes in its thread, and so does who picks in another; the
# replica reads in its own.
_replica_ids: WeakKeyDictionary[Grant | Ticket, str] = WeakKeyDictionary()
_chosen: WeakKeyDictionary[Grant | Ticket, str] = WeakKeyDictionary()
# Those that have not arrived yet, and since when.
_underway: WeakKeyDictionary[Grant | Ticket, tuple[str, float]] = WeakKeyDictionary()
# Those of gateways alone: of a grant nothing is heard before its end.
_since_s: WeakKeyDictionary[Ticket, float] = WeakKeyDictionary()
# Apart, since it's not the router's thread that knows: nothing that the router walks through may grow meanwhile.
_ended: WeakSet[Grant | Ticket] = WeakSet()
_answered: WeakSet[Ticket] = WeakSet()
# When something was last heard of a replica; when it last was among those that a call was to go round.
_heard_s: dict[str, float] = {}
_blamed_s: dict[str, float] = {}
# Of the one pool that a process sends to.
affinity = Affinity()
_picked: WeakKeyDictionary[Grant | Ticket, str] = WeakKeyDictionary()
# The router's own choice, for who wants to know it before Serve is asked; Serve makes routers at the first call.
_pickers: list[Callable[[Grant | Ticket], str | None]] = []
# Held by whoever chooses, or notes: the router's thread, or one that picks.
choosing = threading.Lock()


def let_pick(pick: Callable[[Grant | Ticket], str | None]) -> None:
    """What ``pick`` is to ask, of the one pool that this process sends to."""
    _pickers[:] = [pick]


def pick(call: Grant | Ticket) -> str | None:
    """The replica that Serve will try first for ``call``; ``None`` if there is none, or nobody knows yet."""
    picked = _pickers[0](call) if _pickers else None
    if picked is not None:
        _picked[call] = picked
    return picked


def take_picked(call: Grant | Ticket) -> str | None:
    """What was picked for it, once: where it's refused, another one is as good."""
    return _picked.pop(call, None)


def choose(call: Grant | Ticket, replica_id: str) -> None:
    """It's on its way there, but may not arrive."""
    _chosen[call] = replica_id
    now_s = time.monotonic()
    _underway[call] = replica_id, now_s
    _forget_old(_blamed_s, now_s)
    _blamed_s.update(dict.fromkeys(call.excluded, now_s))
    if isinstance(call, Ticket):
        _since_s[call] = now_s


def note(call: Grant | Ticket, replica_id: str) -> None:
    """It arrived there."""
    with choosing:
        _replica_ids[call] = _chosen[call] = replica_id
        _underway.pop(call, None)
        affinity.note(call.prefix_keys, replica_id)


def heard(call: Ticket) -> None:
    """Something of its answer has arrived, whether it's read already or not."""
    _answered.add(call)
    now_s = time.monotonic()
    replica_id = _replica_ids.get(call, "")
    if replica_id not in _heard_s:
        _forget_old(_heard_s, now_s)  # as good as never heard of
    _heard_s[replica_id] = now_s


def ended(call: Grant | Ticket) -> None:
    """Nobody answers it any more, though it may be held yet: by an error, or for a client that reads slowly."""
    _ended.add(call)


def replica_of(call: Grant | Ticket) -> str | None:
    """``None`` if it went nowhere yet."""
    return _replica_ids.get(call)


def num_chosen() -> Counter[str]:
    """Calls of this process that are being answered, or on their way, by replica."""
    return Counter(replica_id for call, replica_id in _chosen.items() if call not in _ended)


def silent() -> frozenset[str]:
    """Replicas that a call is waiting to be taken by for longer than it should."""
    long_ago_s = time.monotonic() - PATIENCE_S
    return frozenset(
        replica_id for call, (replica_id, since_s) in _underway.items() if since_s < long_ago_s and call not in _ended
    )


def troubled() -> frozenset[str]:
    """Replicas that have failed a call just now, that nothing is heard of though a call waits there, or that let one
    wait for its first answer for long."""
    now_s = time.monotonic()
    _forget_old(_blamed_s, now_s)
    waits = [
        (_chosen[call], now_s - since_s)
        for call, since_s in _since_s.items()
        if now_s - since_s > HEARD_WITHIN_S and call not in _answered and call not in _ended
    ]
    return frozenset(_blamed_s) | {
        replica_id
        for replica_id, wait_s in waits
        if wait_s > FIRST_WITHIN_S or now_s - _heard_s.get(replica_id, -math.inf) > HEARD_WITHIN_S
    }


def _forget_old(when_s: dict[str, float], now_s: float) -> None:
    """Those that nothing has happened with for a while: they may be gone."""
    for replica_id in [one for one, then_s in when_s.items() if now_s - then_s > HEARD_WITHIN_S]:
        del when_s[replica_id]


def num_noted() -> int:
    return len(_replica_ids)
