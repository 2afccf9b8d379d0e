"""All leases of a decode replica: who may use them, and until when.

A reaper's heap holds deadlines. Renewing a lease only moves its own ``deadline``; the entry in the heap is corrected
when its time comes, so that a beat costs nothing per lease but an addition.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from shoal.errors import InternalError, LeaseLost, Unavailable
from shoal.handoff.lease import ENDED, RECEIVING, UNCOMMITTED, Lease, LeaseState
from shoal.handoff.staging import StagingSlots
from shoal.handoff.terms import LeaseTerms, Owner


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """How long a lease may wait (seconds): for a claim, for a beat, for a writer that was told to stop."""

    claim_timeout_s: float
    ttl_s: float
    drain_s: float


class LeaseTable:
    """``clock`` gives monotonic seconds. ``moved`` is told of every change of state, after the table has noted it."""

    def __init__(
        self,
        times: LeaseTimes,
        *,
        clock: Callable[[], float],
        staging: StagingSlots | None = None,
        moved: Callable[[Lease, LeaseState | None], None] = lambda lease, left: None,
    ) -> None:
        self.times = times
        self._clock = clock
        self._staging = staging
        self._on_moved = moved
        self._leases: dict[bytes, Lease] = {}
        self._deadlines: dict[bytes, float] = {}
        # Ids: an entry outlives its lease, which holds a prompt.
        self._heap: list[tuple[float, bytes]] = []
        self._counts: Counter[LeaseState] = Counter()
        self.is_closed = False

    @property
    def num_open(self) -> int:
        """Leases that hold something, and still may end."""
        return len(self._leases)

    @property
    def counts(self) -> Mapping[str, int]:
        """Leases that hold something, by state; the retired ones do so for ever."""
        return {state: number for state, number in self._counts.items() if number}

    @property
    def next_deadline(self) -> float | None:
        """When to call ``expire`` next. It may turn out that nothing has expired."""
        return self._heap[0][0] if self._heap else None

    @property
    def youngest_unclaimed(self) -> Lease | None:
        """The lease to cancel first when blocks run out."""
        unclaimed = (lease for lease in reversed(self._leases.values()) if lease.state is LeaseState.RESERVED)
        return next(unclaimed, None)

    # --- opening --------------------------------------------------------------------------------------

    def reserve(self, lease_id: bytes, terms: LeaseTerms, *, one_sided: bool = False) -> Lease:
        """Open a lease. With ``one_sided`` it gets a staging slot if there is one; else its payload comes inline.

        Raises Unavailable once the table is closed.
        """
        if self.is_closed:
            raise Unavailable("this decode replica is shutting down: no new leases")
        if lease_id in self._leases:
            raise InternalError(f"lease {lease_id.hex()} exists already: mint a new id for every grant")
        slot = self._staging.take() if one_sided and self._staging is not None else None
        return Lease(lease_id, terms, slot=slot, moved=self._moved)

    def close(self) -> None:
        """Open no more leases."""
        self.is_closed = True

    # --- finding --------------------------------------------------------------------------------------

    def claim(self, lease_id: bytes, owner: Owner) -> Lease:
        """Give the lease to its first claimant. Raises LeaseLost if it's unknown, taken, expired or ended."""
        lease = self._leases.get(lease_id)
        if lease is None:
            raise LeaseLost(f"lease {lease_id.hex()} is unknown, or has ended: ask for a new grant")
        if lease.state is LeaseState.RESERVED and self._clock() >= self._deadlines[lease_id]:
            raise LeaseLost(f"lease {lease_id.hex()} was claimed too late: ask for a new grant")
        lease.claim(owner)
        return lease

    def receiving(self, lease_id: bytes, owner: Owner) -> Lease | None:
        """The lease, if ``owner`` may still send K/V for it."""
        lease = self._leases.get(lease_id)
        return lease if lease is not None and lease.owner == owner and lease.state in RECEIVING else None

    def uncommitted(self, owner: Owner | None = None) -> tuple[Lease, ...]:
        """Leases (of one session, or all) that may still fail."""
        return tuple(
            lease
            for lease in self._leases.values()
            if lease.state in UNCOMMITTED and (owner is None or lease.owner == owner)
        )

    # --- time and writers -----------------------------------------------------------------------------

    def renew(self, owner: Owner, lease_ids: Collection[bytes] | None = None) -> None:
        """A beat came: of what its session has claimed, ``lease_ids`` live on for ``ttl_s``, or all."""
        deadline = self._clock() + self.times.ttl_s
        for lease_id in self._leases if lease_ids is None else lease_ids:
            if self.receiving(lease_id, owner) is not None:
                self._deadlines[lease_id] = deadline

    def expire(self) -> tuple[Lease, ...]:
        """Cancel what nobody claimed or renewed in time, and return it; retire what was quarantined in vain."""
        now = self._clock()
        cancelled = []
        while self._heap and self._heap[0][0] <= now:
            _, lease_id = heapq.heappop(self._heap)
            lease, deadline = self._leases.get(lease_id), self._deadlines.get(lease_id)
            if lease is None or deadline is None:
                continue
            if deadline > now:
                self._push(lease_id, deadline)
            elif lease.state is LeaseState.QUARANTINED:
                lease.retire()
            elif lease.cancel(LeaseLost(f"nobody {'renewed' if lease.owner else 'claimed'} the lease in time")):
                cancelled.append(lease)
        return tuple(cancelled)

    def writer_stopped(self, lease_id: bytes, incarnation: int) -> None:
        """Drained came from the process that owns the lease: it writes nothing more.

        A no-op while the lease is wanted: only the answer to a Cancel says anything.
        """
        lease = self._leases.get(lease_id)
        if lease is None or lease.owner is None or lease.state in UNCOMMITTED:
            return
        if lease.owner.incarnation == incarnation:
            lease.writer_stopped()

    def writer_died(self, incarnation: int) -> None:
        """The process is known to be dead and its agent is gone: none of its writes is under way."""
        for lease in tuple(self._leases.values()):
            if lease.owner is not None and lease.owner.incarnation == incarnation:
                lease.writer_stopped()

    # --- what a change of state means -----------------------------------------------------------------

    def _moved(self, lease: Lease, left: LeaseState | None) -> None:
        if left is None:
            self._leases[lease.lease_id] = lease
        else:
            self._counts[left] -= 1
        if lease.state is not LeaseState.RELEASED:
            self._counts[lease.state] += 1
        if lease.state in ENDED:
            del self._leases[lease.lease_id]
            self._give_back_slot(lease)
        self._set_deadline(lease)
        self._on_moved(lease, left)

    def _set_deadline(self, lease: Lease) -> None:
        waits_s = {
            LeaseState.RESERVED: self.times.claim_timeout_s,
            LeaseState.STREAMING: self.times.ttl_s,
            LeaseState.QUARANTINED: self.times.drain_s,
        }.get(lease.state)
        if waits_s is not None:
            deadline = self._clock() + waits_s
            self._deadlines[lease.lease_id] = deadline
            self._push(lease.lease_id, deadline)
        elif lease.state is not LeaseState.SEALED:  # sealing keeps the deadline; the other states wait for no peer
            self._deadlines.pop(lease.lease_id, None)

    def _push(self, lease_id: bytes, deadline: float) -> None:
        heapq.heappush(self._heap, (deadline, lease_id))

    def _give_back_slot(self, lease: Lease) -> None:
        if lease.slot is None or self._staging is None:
            return
        if lease.state is LeaseState.RETIRED:
            self._staging.retire(lease.slot)
        else:
            self._staging.give_back(lease.slot)
