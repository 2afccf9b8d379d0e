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
from shoal.handoff.lease import RECEIVING, UNCOMMITTED, Lease, LeaseState
from shoal.handoff.terms import LeaseTerms, Owner


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """How long a lease may wait (seconds): for a claim, for a beat."""

    claim_timeout_s: float
    ttl_s: float


class LeaseTable:
    """``clock`` gives monotonic seconds. ``moved`` is told of every change of state, after the table has noted it."""

    def __init__(
        self,
        times: LeaseTimes,
        *,
        clock: Callable[[], float],
        moved: Callable[[Lease, LeaseState | None], None] = lambda lease, left: None,
    ) -> None:
        self.times = times
        self._clock = clock
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
        """Leases that hold something, by state."""
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

    def reserve(self, lease_id: bytes, terms: LeaseTerms) -> Lease:
        """Open a lease. Raises Unavailable once the table is closed."""
        if self.is_closed:
            raise Unavailable("this decode replica is shutting down: no new leases")
        if lease_id in self._leases:
            raise InternalError(f"lease {lease_id.hex()} exists already: mint a new id for every grant")
        return Lease(lease_id, terms, moved=self._moved)

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

    # --- time -----------------------------------------------------------------------------------------

    def renew(self, owner: Owner, lease_ids: Collection[bytes] | None = None) -> None:
        """A beat came: of what its session has claimed, ``lease_ids`` live on for ``ttl_s``, or all."""
        deadline = self._clock() + self.times.ttl_s
        for lease_id in self._leases if lease_ids is None else lease_ids:
            if self.receiving(lease_id, owner) is not None:
                self._deadlines[lease_id] = deadline

    def expire(self) -> tuple[Lease, ...]:
        """Cancel what nobody claimed or renewed in time, and return it."""
        now = self._clock()
        cancelled = []
        while self._heap and self._heap[0][0] <= now:
            _, lease_id = heapq.heappop(self._heap)
            lease, deadline = self._leases.get(lease_id), self._deadlines.get(lease_id)
            if lease is None or deadline is None:
                continue
            if deadline > now:
                self._push(lease_id, deadline)
            elif lease.cancel(LeaseLost(f"nobody {'renewed' if lease.owner else 'claimed'} the lease in time")):
                cancelled.append(lease)
        return tuple(cancelled)

    # --- what a change of state means -----------------------------------------------------------------

    def _moved(self, lease: Lease, left: LeaseState | None) -> None:
        if left is None:
            self._leases[lease.lease_id] = lease
        else:
            self._counts[left] -= 1
        if lease.state is LeaseState.RELEASED:
            del self._leases[lease.lease_id]
        else:
            self._counts[lease.state] += 1
        self._set_deadline(lease)
        self._on_moved(lease, left)

    def _set_deadline(self, lease: Lease) -> None:
        waits_s = {
            LeaseState.RESERVED: self.times.claim_timeout_s,
            LeaseState.STREAMING: self.times.ttl_s,
        }.get(lease.state)
        if waits_s is not None:
            deadline = self._clock() + waits_s
            self._deadlines[lease.lease_id] = deadline
            self._push(lease.lease_id, deadline)
        elif lease.state is not LeaseState.SEALED:  # sealing keeps the deadline; the other states wait for no peer
            self._deadlines.pop(lease.lease_id, None)

    def _push(self, lease_id: bytes, deadline: float) -> None:
        heapq.heappush(self._heap, (deadline, lease_id))
