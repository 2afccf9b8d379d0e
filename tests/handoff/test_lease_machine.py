"""The lease protocol under everything that may happen, in any order: hypothesis looks for the order that breaks it.

Two prefill processes with a session each, a network that may lose, double, corrupt and reorder what they send, copies
that end when they like, and a clock. After every step:

I1  no block is free while a copy into it is under way
I2  what is committed is complete, and byte for byte what the one claimant computed
I3  once all have gone, ``ttl`` later nothing is held                    (in ``teardown``)
I4  nobody has the prompt who doesn't own the lease, and a lease has one owner ever
I5  nothing that another session or incarnation says changes a lease
I6  the copies alone give the credit back, in whatever state their lease is
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

import pytest
from examples import examples
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal.errors import Cancelled, ChecksumMismatch, HandoffError, LeaseLost, PeerGone
from shoal.handoff.base import crc32c, prompt_hash
from shoal.handoff.channels.faults import flip_bit
from shoal.handoff.lease import Lease, LeaseState, Receipt
from shoal.handoff.lease_table import LeaseTable, LeaseTimes
from shoal.handoff.terms import KvShape, LeaseTerms, Owner
from shoal.wire.handoff_messages import Chunk, Envelope, Seal

TIMES = LeaseTimes(claim_timeout_s=30.0, ttl_s=5.0)
SHAPE = KvShape("plan", num_layers=2, num_shallow_layers=1, token_layer_bytes=1)
CREDIT_BYTES = 6
Cell = tuple[int, int]


@dataclass
class Writer:
    """What a prefill process does for a lease that it claimed."""

    owner: Owner
    chunks: list[Chunk]
    seal: Seal
    num_sent: int = 0
    resent: set[int] = field(default_factory=set)
    heard_cancel: bool = False
    is_dead: bool = False


def compute(lease: Lease, seed: int) -> tuple[list[Chunk], Seal]:
    """Random K/V of a lease, in chunks that tile it in a random way."""
    rng, terms = random.Random(seed), lease.terms
    chunks: list[Chunk] = []
    end = len(terms.token_ids) - 1
    for layer in range(SHAPE.num_layers):
        start = terms.num_present
        while start < end:
            stop = min(end, start + rng.randint(1, 3))
            payload = rng.randbytes(stop - start)
            chunks.append(Chunk(lease.lease_id, 0, start, stop, layer, layer + 1, crc32c(payload), payload))
            start = stop
    rng.shuffle(chunks)
    chunks = [replace(chunk, seq=seq) for seq, chunk in enumerate(chunks)]
    seal = Seal(lease.lease_id, len(chunks), prompt_hash(terms.token_ids), terms.token_ids[-1], 0.0, 0.0)
    return chunks, seal


class LeaseMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 100.0
        self.table = LeaseTable(TIMES, clock=lambda: self.now_s)
        self.leases: dict[bytes, Lease] = {}
        self.writers: dict[bytes, Writer] = {}
        self.sessions = [Owner(0, 11), Owner(1, 22)]
        self.network: list[tuple[Owner, Chunk | Seal]] = []
        self.copying: list[Chunk] = []
        self.copied: dict[bytes, dict[Cell, int]] = defaultdict(dict)
        self.past_owners: dict[bytes, Owner] = {}
        self.num_committed = 0

    # --- decode -----------------------------------------------------------------------------------------

    @rule(num_tokens=st.integers(1, 6), num_present=st.integers(0, 5))
    def reserve(self, num_tokens: int, num_present: int) -> None:
        lease_id = (len(self.leases) + 1).to_bytes(16, "big")
        terms = LeaseTerms(tuple(range(num_tokens)), min(num_present, num_tokens - 1), SHAPE, CREDIT_BYTES)
        self.leases[lease_id] = self.table.reserve(lease_id, terms)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        lease = self._some_lease(data)
        if lease is not None:
            was_open = lease.state in (LeaseState.RESERVED, LeaseState.STREAMING, LeaseState.SEALED)
            assert lease.cancel(Cancelled("by decode")) is was_open

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = self._some_lease(data)
        if lease is not None:
            was = lease.state
            lease.release()
            lease.release()
            assert was is LeaseState.COMMITTED or lease.state is was

    @rule(data=st.data())
    @precondition(lambda self: self.copying)
    def finish_copy(self, data: st.DataObject) -> None:
        chunk = self.copying.pop(data.draw(st.integers(0, len(self.copying) - 1)))
        lease = self.leases[chunk.lease_id]
        assert lease.state is not LeaseState.RELEASED  # or it would write into blocks of somebody else
        for offset, byte in enumerate(chunk.payload):
            self.copied[chunk.lease_id][chunk.layer_start, chunk.token_start + offset] = byte
        try:
            receipt = lease.copied(chunk.seq, crc32c(chunk.payload))
        except ChecksumMismatch as error:
            lease.cancel(error)
            return
        assert (receipt is Receipt.DROP) == (lease.state not in (LeaseState.STREAMING, LeaseState.SEALED))
        if receipt is Receipt.RESEND:
            self._nack(lease, chunk.seq)
        self._commit_if_complete(lease)

    # --- prefill ----------------------------------------------------------------------------------------

    @rule(data=st.data(), who=st.integers(0, 1))
    def claim(self, data: st.DataObject, who: int) -> None:
        lease = self._some_lease(data)
        if lease is None:
            return
        owner, was_claimed = self.sessions[who], lease.owner
        try:
            self.table.claim(lease.lease_id, owner)
        except LeaseLost:
            assert was_claimed is not None or lease.state is not LeaseState.RESERVED or self._is_overdue(lease)
            return
        assert was_claimed in (None, owner)
        if lease.lease_id not in self.writers:
            chunks, seal = compute(lease, seed=len(self.leases))
            self.writers[lease.lease_id] = Writer(owner, chunks, seal)
            self.past_owners[lease.lease_id] = owner

    @rule(data=st.data())
    def send_next(self, data: st.DataObject) -> None:
        writer = self._some_writer(data)
        if writer is not None and not writer.heard_cancel and writer.num_sent < len(writer.chunks):
            self.network.append((writer.owner, writer.chunks[writer.num_sent]))
            writer.num_sent += 1

    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        writer = self._some_writer(data)
        if writer is not None and not writer.heard_cancel and writer.num_sent == len(writer.chunks):
            self.network.append((writer.owner, writer.seal))

    @rule(data=st.data())
    def hear_of_the_end(self, data: st.DataObject) -> None:
        """Cancel, or Committed, has reached prefill."""
        writer = self._some_writer(data)
        if writer is not None and self.leases[writer.seal.lease_id].state not in (
            LeaseState.STREAMING,
            LeaseState.SEALED,
        ):
            writer.heard_cancel = True

    # --- the network ------------------------------------------------------------------------------------

    @rule(data=st.data(), twice=st.booleans())
    @precondition(lambda self: self.network)
    def deliver(self, data: st.DataObject, twice: bool) -> None:
        place = data.draw(st.integers(0, len(self.network) - 1))
        owner, frame = self.network[place] if twice else self.network.pop(place)
        self._receive(owner, frame)

    @rule(data=st.data())
    @precondition(lambda self: self.network)
    def lose(self, data: st.DataObject) -> None:
        self.network.pop(data.draw(st.integers(0, len(self.network) - 1)))

    @rule(data=st.data(), bit=st.integers(0, 63))
    @precondition(lambda self: self.network)
    def corrupt(self, data: st.DataObject, bit: int) -> None:
        place = data.draw(st.integers(0, len(self.network) - 1))
        owner, frame = self.network[place]
        damaged = flip_bit(Envelope(1, frame), bit).frame
        assert isinstance(damaged, Chunk | Seal)
        self.network[place] = (owner, damaged)

    @rule(data=st.data())
    @precondition(lambda self: self.network)
    def haunt(self, data: st.DataObject) -> None:
        """The same frame, said by somebody who doesn't own the lease; and by the owner's earlier incarnation."""
        owner, frame = data.draw(st.sampled_from(self.network))
        lease = self.leases[frame.lease_id]
        before = (lease.state, lease.num_copies)
        for stranger in (
            Owner(owner.session_id + 7, owner.incarnation),
            Owner(owner.session_id, owner.incarnation + 7),
        ):
            assert self.table.receiving(frame.lease_id, stranger) is None
        assert (lease.state, lease.num_copies) == before

    # --- time and death ---------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.5, 2.0, 5.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self._expire()

    @rule(who=st.integers(0, 1))
    def beat(self, who: int) -> None:
        self.table.renew(self.sessions[who])

    @rule(data=st.data(), who=st.integers(0, 1))
    def beat_of_some(self, data: st.DataObject, who: int) -> None:
        """I5: it renews what it names of its own, and nothing else."""
        named = data.draw(st.lists(st.sampled_from([bytes(16), *self.leases]), unique=True))
        before = dict(self.table._deadlines)
        self.table.renew(self.sessions[who], named)
        for lease_id, deadline_s in self.table._deadlines.items():
            is_meant = lease_id in named and self.table.receiving(lease_id, self.sessions[who]) is not None
            assert deadline_s == (self.now_s + TIMES.ttl_s if is_meant else before[lease_id])

    @rule(who=st.integers(0, 1))
    def session_ends(self, who: int) -> None:
        """The stream broke; the process may live on. It comes back with a new session."""
        old = self.sessions[who]
        for lease in self.table.uncommitted(old):
            assert lease.cancel(PeerGone("the stream broke"))
        self.sessions[who] = Owner(old.session_id + 2, old.incarnation)

    @rule(who=st.integers(0, 1))
    def process_dies(self, who: int) -> None:
        """It comes back as another."""
        old = self.sessions[who]
        for writer in self.writers.values():
            if writer.owner.incarnation == old.incarnation:
                writer.is_dead = True
        for lease in self.table.uncommitted(old):
            lease.cancel(PeerGone("the process died"))
        self.sessions[who] = Owner(old.session_id + 2, old.incarnation + 100)

    # --- what must hold ---------------------------------------------------------------------------------

    @invariant()
    def i2_what_is_committed_is_whole(self) -> None:
        for lease in self._open():
            if lease.state is LeaseState.COMMITTED:
                expected = {
                    (chunk.layer_start, chunk.token_start + offset): byte
                    for chunk in self.writers[lease.lease_id].chunks
                    for offset, byte in enumerate(chunk.payload)
                }
                assert self.copied[lease.lease_id] == expected
                assert len(expected) == (len(lease.terms.token_ids) - 1 - lease.terms.num_present) * 2

    @invariant()
    def i4_a_lease_has_one_owner_ever(self) -> None:
        for lease_id, lease in self.leases.items():
            assert lease.owner == self.past_owners.get(lease_id)

    @invariant()
    def i6_credit_depends_on_copies_alone(self) -> None:
        for lease in self.leases.values():
            copies = [chunk for chunk in self.copying if chunk.lease_id == lease.lease_id]
            assert lease.num_copies == len(copies)
            assert sum(len(chunk.payload) for chunk in copies) <= CREDIT_BYTES
            if copies:
                assert lease.state is not LeaseState.RELEASED

    @invariant()
    def counts_are_what_is_there(self) -> None:
        open_states = [lease.state for lease in self._open()]
        assert self.table.num_open == len(open_states)
        assert self.table.counts == Counter(open_states)

    def teardown(self) -> None:
        """I3: all streams break, all copies end; whoever comes for their committed K/V takes them."""
        for who in (0, 1):
            self.session_ends(who)
        for chunk in self.copying:
            assert self.leases[chunk.lease_id].copied(chunk.seq, chunk.crc32c) is Receipt.DROP
        for lease in self.leases.values():
            lease.release()
        unclaimed = {lease.lease_id for lease in self._open() if lease.state is LeaseState.RESERVED}
        self.now_s += TIMES.ttl_s
        self._expire()
        assert {lease.lease_id for lease in self._open()} <= unclaimed
        self.now_s += TIMES.claim_timeout_s
        self._expire()
        assert self.table.num_open == 0

    # --- inside -----------------------------------------------------------------------------------------

    def _open(self) -> list[Lease]:
        return [lease for lease in self.leases.values() if lease.state is not LeaseState.RELEASED]

    def _some_lease(self, data: st.DataObject) -> Lease | None:
        return data.draw(st.sampled_from(list(self.leases.values()))) if self.leases else None

    def _some_writer(self, data: st.DataObject) -> Writer | None:
        living = [writer for writer in self.writers.values() if not writer.is_dead]
        return data.draw(st.sampled_from(living)) if living else None

    def _is_overdue(self, lease: Lease) -> bool:
        return self.table._deadlines[lease.lease_id] <= self.now_s

    def _expire(self) -> None:
        for lease in self.table.expire():
            assert isinstance(lease.error, LeaseLost)
        deadline = self.table.next_deadline
        assert deadline is None or deadline > self.now_s

    def _receive(self, owner: Owner, frame: Chunk | Seal) -> None:
        lease = self.table.receiving(frame.lease_id, owner)
        if lease is None:
            return
        try:
            if isinstance(frame, Seal):
                for seq in lease.seal(frame):
                    self._nack(lease, seq)
                self._commit_if_complete(lease)
            elif (receipt := lease.receive(frame)) is Receipt.COPY:
                self.copying.append(frame)
            elif receipt is Receipt.RESEND:
                self._nack(lease, frame.seq)
        except HandoffError as error:
            lease.cancel(error)

    def _nack(self, lease: Lease, seq: int) -> None:
        writer = self.writers[lease.lease_id]
        if not writer.heard_cancel and not writer.is_dead and seq not in writer.resent:
            writer.resent.add(seq)
            self.network.append((writer.owner, writer.chunks[seq]))

    def _commit_if_complete(self, lease: Lease) -> None:
        if lease.is_complete:
            lease.commit()
            self.num_committed += 1


class QuickLeaseMachine(LeaseMachine):
    """Starts with a lease whose chunks are all on their way, and some there, so that short runs get far."""

    @initialize(data=st.data(), num_tokens=st.integers(2, 6), seal_first=st.booleans())
    def begin(self, data: st.DataObject, num_tokens: int, seal_first: bool) -> None:
        self.reserve(num_tokens, 0)
        self.claim(data, 0)
        for _ in range(2 * num_tokens):
            self.send_next(data)
        self.seal(data)
        if seal_first:  # then every chunk is asked for once more, though none was lost
            self._receive(*self.network.pop())
        for _ in range(data.draw(st.integers(0, len(self.network)))):
            self.deliver(data, False)
        for _ in range(data.draw(st.integers(0, len(self.copying)))):
            self.finish_copy(data)


for machine in (LeaseMachine, QuickLeaseMachine):
    machine.TestCase.settings = examples(
        120,
        stateful_step_count=40,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )

TestLeaseMachine = LeaseMachine.TestCase
TestQuickLeaseMachine = QuickLeaseMachine.TestCase


def test_the_machine_gets_to_commits() -> None:
    """A machine that never commits anything would find nothing wrong."""
    machine = LeaseMachine()
    machine.reserve(5, 1)
    lease = machine.leases[(1).to_bytes(16, "big")]
    machine.table.claim(lease.lease_id, machine.sessions[0])
    chunks, seal = compute(lease, seed=1)
    machine.writers[lease.lease_id] = Writer(machine.sessions[0], chunks, seal)
    machine.past_owners[lease.lease_id] = machine.sessions[0]
    for frame in (seal, *reversed(chunks)):
        machine._receive(machine.sessions[0], frame)
        for chunk in machine.copying:
            for offset, byte in enumerate(chunk.payload):
                machine.copied[lease.lease_id][chunk.layer_start, chunk.token_start + offset] = byte
            assert lease.copied(chunk.seq, chunk.crc32c) is Receipt.CREDIT
        machine.copying.clear()
        machine._commit_if_complete(lease)
    assert machine.num_committed == 1
    machine.i2_what_is_committed_is_whole()
    machine.copied[lease.lease_id][0, 1] ^= 1
    with pytest.raises(AssertionError):
        machine.i2_what_is_committed_is_whole()
