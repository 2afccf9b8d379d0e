"""Which replica of a pool gets a call. Its caller decides, by what it has sent there itself; no Ray, no tensors.

It's the replica where a prompt's beginning is known already, if that one isn't too busy; otherwise the one that is less
busy of two random ones; or, of replicas that share their cores, the busiest that has room, since each reads all weights
for whatever it answers. It isn't one that has failed the prompt, as long as there is another.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass

from shoal.decode.affinity import Affinity

MAX_LONGER = 4
"""How many more calls a replica that knows a prompt's beginning may have than the idlest one. Beyond that, waiting
would take longer than computing it once more; and the other then knows it, too."""

PATIENCE_S = 0.3
"""Within it, a replica that lives takes a call, also on a machine that is busy."""

HEARD_WITHIN_S, FIRST_WITHIN_S = 2.0, 10.0
"""A replica that nothing was heard of for so long, though a call waits there, or where one waits for its first answer
for so long, may hang, or have no memory left: it isn't packed any fuller."""


@dataclass(slots=True, eq=False)
class Call:
    """One call that isn't over."""

    replica_id: str
    since_s: float


class Balancer:
    """Belongs to one thread. ``pack_up_to`` calls are for one replica before another one gets any; 0: they are
    spread."""

    def __init__(self, pack_up_to: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._pack_up_to = pack_up_to
        self._clock = clock
        self._affinity = Affinity()
        # By replica, the oldest first, so that a look takes no longer the more calls there are.
        self._open: dict[str, dict[Call, None]] = {}
        self._underway: dict[str, dict[Call, None]] = {}
        self._unanswered: dict[str, dict[Call, None]] = {}
        self._heard_s: dict[str, float] = {}
        self._failed_s: dict[str, float] = {}

    def num_open(self, replica_id: str) -> int:
        return len(self._open.get(replica_id, ()))

    def choose(
        self, replica_ids: AbstractSet[str], keys: Sequence[bytes] = (), failed: AbstractSet[str] = frozenset()
    ) -> str:
        """One of ``replica_ids``, of which there must be some, for a prompt whose beginnings have these ``keys``
        (decode/affinity.py), and that these have ``failed``."""
        now_s = self._clock()
        self._failed_s.update(dict.fromkeys(failed, now_s))
        # If all have failed it, one of them is still better than none.
        candidates = replica_ids - failed or replica_ids
        lengths = {one: self.num_open(one) for one in candidates}
        self._forget(now_s)
        silent = self._silent(now_s)
        troubled = self._troubled(now_s) if self._pack_up_to else frozenset[str]()
        chosen = self._packed(lengths, silent, troubled) if self._pack_up_to else _spread(lengths, silent)
        known = self._affinity.best(keys, candidates - silent - troubled)
        shortest = min((length for one, length in lengths.items() if one not in silent), default=0)
        if known is not None and lengths[known] <= max(shortest + MAX_LONGER, self._pack_up_to - 1):
            return known
        return chosen

    @contextmanager
    def call(self, replica_id: str, keys: Sequence[bytes] = ()) -> Iterator[Call]:
        """A call there, for as long as it's open."""
        self._affinity.note(keys, replica_id)
        call = Call(replica_id, self._clock())
        for calls in (self._open, self._underway, self._unanswered):
            calls.setdefault(replica_id, {})[call] = None
        try:
            yield call
        finally:
            for calls in (self._open, self._underway, self._unanswered):
                _take(calls, call)

    def accepted(self, call: Call) -> None:
        """The replica has it."""
        _take(self._underway, call)

    def heard(self, call: Call) -> None:
        """Something of its answer has come."""
        self.accepted(call)
        _take(self._unanswered, call)
        self._heard_s[call.replica_id] = self._clock()

    def _silent(self, now_s: float) -> frozenset[str]:
        """Replicas that a call is waiting to be taken by for longer than it should."""
        return frozenset(one for one, calls in self._underway.items() if now_s - next(iter(calls)).since_s > PATIENCE_S)

    def _troubled(self, now_s: float) -> frozenset[str]:
        """Replicas that have failed a call just now, that nothing is heard of though a call waits there, or that let
        one wait for its first answer for long."""
        waits_s = {one: now_s - next(iter(calls)).since_s for one, calls in self._unanswered.items()}
        return frozenset(self._failed_s) | {
            one
            for one, wait_s in waits_s.items()
            if wait_s > FIRST_WITHIN_S or (wait_s > HEARD_WITHIN_S and one not in self._heard_s)
        }

    def _forget(self, now_s: float) -> None:
        """When something was last heard of replicas, or they failed: if that is long ago, they may be gone."""
        for when_s in (self._failed_s, self._heard_s):
            for one in [one for one, then_s in when_s.items() if now_s - then_s > HEARD_WITHIN_S]:
                del when_s[one]

    def _packed(self, lengths: dict[str, int], silent: AbstractSet[str], troubled: AbstractSet[str]) -> str:
        """The busiest that has room before all others; of those that have none the least busy."""
        full = troubled | {one for one, length in lengths.items() if length >= self._pack_up_to}
        order = {one: length if one in full else -length for one, length in lengths.items()}
        # By name where two are alike, so that several callers fill the same one.
        return min(lengths, key=lambda one: (one in silent, one in full, order[one], one))


def _spread(lengths: dict[str, int], silent: AbstractSet[str]) -> str:
    """The less busy of two random ones; of those that may hang only where there is no other."""
    names = [one for one in lengths if one not in silent] or list(lengths)
    return min(random.sample(names, min(2, len(names))), key=lengths.__getitem__)


def _take(calls: dict[str, dict[Call, None]], call: Call) -> None:
    of_replica = calls.get(call.replica_id, {})
    of_replica.pop(call, None)
    if not of_replica:
        calls.pop(call.replica_id, None)
