from __future__ import annotations

import gc
import weakref

import pytest

from shoal.errors import Cancelled, InternalError, LeaseLost, Unavailable
from shoal.handoff.base import prompt_hash
from shoal.handoff.lease import Lease, LeaseState
from shoal.handoff.lease_table import LeaseTable, LeaseTimes
from shoal.handoff.terms import KvShape, LeaseTerms, Owner
from shoal.wire.handoff_messages import Seal

SHAPE = KvShape("plan", num_layers=2, num_shallow_layers=1, token_layer_bytes=4)
TERMS = LeaseTerms((1, 2, 3), 0, SHAPE, 1024)
US, THEM = Owner(0, 11), Owner(1, 22)


class Table:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.states: list[LeaseState] = []
        times = LeaseTimes(claim_timeout_s=30, ttl_s=5)
        self.leases = LeaseTable(times, clock=lambda: self.now_s, moved=self._moved)

    def _moved(self, lease: Lease, left: LeaseState | None) -> None:
        self.states.append(lease.state)

    def reserve(self, name: int = 1, terms: LeaseTerms = TERMS) -> Lease:
        return self.leases.reserve(name.to_bytes(16, "big"), terms)

    def expire_at(self, now_s: float) -> int:
        self.now_s = now_s
        return len(self.leases.expire())


@pytest.fixture
def table() -> Table:
    return Table()


def test_the_straight_way_through_the_states(table: Table) -> None:
    lease = table.reserve(terms=LeaseTerms((7,), 0, SHAPE, 1024))
    table.leases.claim(lease.lease_id, US)
    assert lease.seal(Seal(lease.lease_id, 0, prompt_hash((7,)), 7, 0.0, 0.0)) == ()
    lease.commit()
    lease.release()
    assert table.states == [
        LeaseState.RESERVED,
        LeaseState.STREAMING,
        LeaseState.SEALED,
        LeaseState.COMMITTED,
        LeaseState.RELEASED,
    ]
    assert table.leases.num_open == 0


def test_a_claim_ends_the_claim_timeout_and_starts_the_ttl(table: Table) -> None:
    lease = table.reserve()
    table.now_s = 29
    table.leases.claim(lease.lease_id, US)
    assert table.expire_at(33.9) == 0
    assert table.expire_at(34) == 1


def test_a_late_claim_finds_the_lease_lost_even_before_the_reaper_came(table: Table) -> None:
    lease = table.reserve()
    table.now_s = 30
    with pytest.raises(LeaseLost, match="too late"):
        table.leases.claim(lease.lease_id, US)


def test_renewing_moves_the_deadlines_of_that_session_only(table: Table) -> None:
    ours, theirs = table.reserve(1), table.reserve(2)
    table.leases.claim(ours.lease_id, US)
    table.leases.claim(theirs.lease_id, THEM)
    for now_s in (4.0, 8.0):
        table.now_s = now_s
        table.leases.renew(US)
        table.leases.expire()
    assert (ours.state, theirs.state) == (LeaseState.STREAMING, LeaseState.RELEASED)
    assert table.expire_at(13) == 1


def test_a_beat_renews_what_it_names_if_it_is_that_sessions(table: Table) -> None:
    ours, left, theirs = table.reserve(1), table.reserve(2), table.reserve(3)
    for lease in (ours, left):
        table.leases.claim(lease.lease_id, US)
    table.leases.claim(theirs.lease_id, THEM)
    table.now_s = 4.0
    table.leases.renew(US, (ours.lease_id, theirs.lease_id, bytes(16)))
    assert table.expire_at(8) == 2
    assert [lease.state is LeaseState.STREAMING for lease in (ours, left, theirs)] == [True, False, False]


def test_renewing_does_not_revive_or_claim_anything(table: Table) -> None:
    unclaimed = table.reserve()
    table.now_s = 29
    table.leases.renew(US)
    assert table.expire_at(30) == 1
    assert unclaimed.state is LeaseState.RELEASED


def test_the_heap_does_not_grow_with_renewals(table: Table) -> None:
    lease = table.reserve()
    table.leases.claim(lease.lease_id, US)
    for second in range(1, 200):
        table.now_s = second
        table.leases.renew(US)
        table.leases.expire()
    assert len(table.leases._heap) <= 2


def test_the_youngest_unclaimed_lease_is_the_first_to_go(table: Table) -> None:
    leases = [table.reserve(name) for name in (1, 2, 3)]
    table.leases.claim(leases[2].lease_id, US)
    assert table.leases.youngest_unclaimed is leases[1]
    leases[1].cancel(Cancelled("out of blocks"))
    assert table.leases.youngest_unclaimed is leases[0]
    leases[0].cancel(Cancelled("out of blocks"))
    assert table.leases.youngest_unclaimed is None


def test_a_closed_table_opens_nothing_but_lets_claims_be_made(table: Table) -> None:
    lease = table.reserve()
    table.leases.close()
    with pytest.raises(Unavailable):
        table.reserve(2)
    table.leases.claim(lease.lease_id, US)


def test_a_lease_id_is_used_once(table: Table) -> None:
    table.reserve()
    with pytest.raises(InternalError):
        table.reserve()


@pytest.mark.parametrize(("num_tokens", "num_present"), [(0, 0), (1, 1), (3, 3), (3, -1)])
def test_the_boundary_token_is_never_present(num_tokens: int, num_present: int) -> None:
    with pytest.raises(InternalError):
        LeaseTerms(tuple(range(num_tokens)), num_present, SHAPE, 1024)


def test_an_incomplete_lease_cannot_be_committed(table: Table) -> None:
    with pytest.raises(InternalError):
        table.reserve().commit()


def test_a_lease_that_has_ended_is_kept_by_nothing_of_the_table(table: Table) -> None:
    lease = table.reserve()
    kept = weakref.ref(lease)
    lease.cancel(Cancelled("out of blocks"))
    del lease
    gc.collect()
    assert kept() is None
