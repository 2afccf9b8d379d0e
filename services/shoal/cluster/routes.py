"""What this process' routers know: which replica each call went to, and where prompts that began alike went."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from weakref import WeakKeyDictionary, WeakSet, ref

from shoal.decode.affinity import Affinity
from shoal.wire.handoff_messages import Grant

PATIENCE_S = 0.3
"""Within it, a replica that lives takes a call, or says that it won't, also on a machine that is busy."""

BLAMED_S = 2.0
"""How long a replica that has failed a call gets no more than its part."""


class _Calls:
    """Calls by replica, each replica's in the order in which they came; one that nobody holds any more is none.

    However many there are, a look at them takes no longer: whoever chooses looks, for each call of a burst. All but
    ``leave`` is for who holds ``choosing``.
    """

    def __init__(self) -> None:
        self._replica_ids: dict[ref[Grant], str] = {}
        self._since_s: dict[str, OrderedDict[ref[Grant], float]] = {}
        self._gone: deque[ref[Grant]] = deque()

    def replica_of(self, call: Grant) -> str | None:
        return self._replica_ids.get(ref(call))

    def put(self, call: Grant, replica_id: str, since_s: float) -> None:
        """It's there from now on, which is ``since_s``, and nowhere else."""
        self._take(ref(call))
        one = ref(call, self._gone.append)
        self._replica_ids[one] = replica_id
        self._since_s.setdefault(replica_id, OrderedDict())[one] = since_s
        self._take_gone()

    def take(self, call: Grant) -> None:
        self._take(ref(call))

    def leave(self, call: Grant) -> None:
        """Any thread may say so. It's taken out at the next look, or after the next one is put in: it may be that
        one."""
        one = ref(call)
        hash(one)  # which it keeps, while the call itself may be gone by then
        self._gone.append(one)

    def num(self) -> Counter[str]:
        """How many each replica has that has any."""
        self._take_gone()
        return Counter({replica_id: len(since_s) for replica_id, since_s in self._since_s.items()})

    def oldest_s(self) -> dict[str, float]:
        """Since when each replica has the one that came first of those that it has."""
        self._take_gone()
        return {replica_id: next(iter(since_s.values())) for replica_id, since_s in self._since_s.items()}

    def _take_gone(self) -> None:
        while self._gone:
            self._take(self._gone.popleft())

    def _take(self, one: ref[Grant]) -> None:
        replica_id = self._replica_ids.pop(one, None)
        if replica_id is not None:
            calls = self._since_s[replica_id]
            del calls[one]
            if not calls:
                del self._since_s[replica_id]


# A call is forgotten with the call itself. Serve's router writes in its thread, and so does who picks in another; the
# replica reads in its own.
_replica_ids: WeakKeyDictionary[Grant, str] = WeakKeyDictionary()
# None of these has ended.
_chosen = _Calls()
# Those that have not arrived yet.
_underway = _Calls()
# Apart, since it's not the router's thread that knows: one of these is put there no more. Who adds it here says only
# then that it leaves, so that it doesn't stay where it's put meanwhile.
_ended: WeakSet[Grant] = WeakSet()
# When a replica last was among those that a call was to go round.
_blamed_s: dict[str, float] = {}
# Of the one pool that a process sends to.
affinity = Affinity()
_picked: WeakKeyDictionary[Grant, str] = WeakKeyDictionary()
# The router's own choice, for who wants to know it before Serve is asked; Serve makes routers at the first call.
_pickers: list[Callable[[Grant], str | None]] = []
# Held by whoever chooses, or notes: the router's thread, or one that picks.
choosing = threading.Lock()


def let_pick(pick: Callable[[Grant], str | None]) -> None:
    """What ``pick`` is to ask, of the one pool that this process sends to."""
    _pickers[:] = [pick]


def pick(call: Grant) -> str | None:
    """The replica that Serve will try first for ``call``; ``None`` if there is none, or nobody knows yet."""
    picked = _pickers[0](call) if _pickers else None
    if picked is not None:
        _picked[call] = picked
    return picked


def take_picked(call: Grant) -> str | None:
    """What was picked for it, once: where it's refused, another one is as good."""
    return _picked.pop(call, None)


def choose(call: Grant, replica_id: str) -> None:
    """It's on its way there, but may not arrive."""
    now_s = time.monotonic()
    _forget_old(_blamed_s, now_s)
    _blamed_s.update(dict.fromkeys(call.excluded, now_s))
    if call in _ended:  # Serve hears that a moment later
        return
    _chosen.put(call, replica_id, now_s)
    _underway.put(call, replica_id, now_s)


def note(call: Grant, replica_id: str) -> None:
    """It arrived there."""
    with choosing:
        _replica_ids[call] = replica_id
        _underway.take(call)
        now_s = time.monotonic()
        if call not in _ended:
            _chosen.put(call, replica_id, now_s)
        affinity.note(call.prefix_keys, replica_id)


def ended(call: Grant) -> None:
    """Nobody answers it any more, though it may be held yet: by an error, or for a client that reads slowly."""
    if call not in _ended:
        _ended.add(call)
        _chosen.leave(call)
        _underway.leave(call)


def replica_of(call: Grant) -> str | None:
    """``None`` if it went nowhere yet."""
    return _replica_ids.get(call)


def num_chosen() -> Counter[str]:
    """Calls of this process that are being answered, or on their way, by replica."""
    return _chosen.num()


def silent() -> frozenset[str]:
    """Replicas that a call is waiting to be taken by for longer than it should."""
    long_ago_s = time.monotonic() - PATIENCE_S
    return frozenset(replica_id for replica_id, since_s in _underway.oldest_s().items() if since_s < long_ago_s)


def troubled() -> frozenset[str]:
    """Replicas that have failed a call just now."""
    _forget_old(_blamed_s, time.monotonic())
    return frozenset(_blamed_s)


def _forget_old(when_s: dict[str, float], now_s: float) -> None:
    for replica_id in [one for one, then_s in when_s.items() if now_s - then_s > BLAMED_S]:
        del when_s[replica_id]


def num_noted() -> int:
    return len(_replica_ids)
