"""Both sides of the hand-off, as they are, under everything that may happen, in any order.

Two prefill replicas and a decode replica: their sessions, desk, leases and allocators are the real ones; frames on the
way, copies, reads, steps and time are the machine's (handoff_pools.py). It loses, doubles, reorders and spoils frames,
breaks connections and cuts them off, kills replicas or freezes them while others take their place, lets clients leave.
After every step:

I1  a slot that decode may still read for a lease isn't another chunk's
I2  what is committed is the prompt's K/V, byte for byte, and stays so as long as its blocks are held
I3  no block is held but by an open request; at the end, within twice the ttl, nothing is held on either side
I4  prefill computes only what decode let it claim, and has the prompt's ids from there
I5  what another start of a process says changes nothing
I6  without a fault all is committed without that any time passes, whatever the order
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from examples import examples
from fake_clock import settle
from handoff_gates import BLOCK_TOKENS, Gates, Wire
from handoff_pools import TIMES, Pools, Request
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kv_prompts import prompt
from more_faults import Reset

from shoal.errors import OutOfBlocks
from shoal.handoff.channels.faults import Corrupt, Delay, Drop, Duplicate, Fault
from shoal.wire.handoff_messages import (
    Accepted,
    Beat,
    Cancel,
    Chunk,
    Claim,
    Committed,
    Credit,
    Envelope,
    Failed,
    Frame,
    Hello,
    Nack,
    Seal,
)

MAX_TOKENS = 24
WAYS = st.integers(0, 1)
PLACES = st.integers(0, 30)
SIZES = st.integers(2, MAX_TOKENS)
HELD = st.sampled_from(["nothing", "copies", "reads", "steps"])
FaultMaker = tuple[type[Fault], type[Frame], int, int]
KINDS = st.sampled_from([Hello, Claim, Accepted, Chunk, Credit, Nack, Seal, Committed, Failed, Cancel, Beat])
FAULTS = st.one_of(
    st.tuples(st.just(Corrupt), st.just(Chunk), st.integers(0, 3), st.integers(1, 2)),
    st.tuples(st.sampled_from([Drop, Duplicate, Delay, Reset]), KINDS, st.integers(0, 2), st.integers(1, 3)),
)

stormy = precondition(lambda machine: not machine.is_calm)


class Nth:
    """All frames of a kind, the first few excepted."""

    def __init__(self, kind: type[Frame], number: int) -> None:
        self._kind, self._num_left = kind, number

    def __call__(self, frame: Frame) -> bool:
        if isinstance(frame, self._kind):
            self._num_left -= 1
        return isinstance(frame, self._kind) and self._num_left < 0


class HandoffMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.requests: list[Request] = []
        self.said: list[tuple[int, Envelope]] = []
        self.is_calm = True

    def do(self, work: Coroutine[Any, Any, Any]) -> None:
        self.loop.run_until_complete(work)

    @initialize(
        is_calm=st.booleans(), is_staged=st.booleans(), is_hidden=st.booleans(),
        asked=st.lists(st.tuples(SIZES, WAYS), min_size=1, max_size=4),
        faults=st.lists(FAULTS, max_size=3), steps=st.integers(0, 8), held=HELD, is_astray=st.booleans(),
    )  # fmt: skip
    def start(
        self,
        is_calm: bool,
        is_staged: bool,
        is_hidden: bool,
        asked: list[tuple[int, int]],
        faults: list[FaultMaker],
        steps: int,
        held: str,
        is_astray: bool = False,
    ) -> None:
        """In the midst of things, so that short runs get far. In calm no harm is done."""

        async def started() -> Pools:
            return Pools(is_staged=is_staged, is_hidden=is_hidden)

        self.pools = self.loop.run_until_complete(started())
        self.is_calm = is_calm
        for fault in faults:
            self.arm(fault)
        for num_tokens, which in asked:
            self.ask(num_tokens, 0, which, is_astray)
        self.go_on(steps, held)

    # --- what is wanted ---------------------------------------------------------------------------------

    @rule(num_tokens=SIZES, num_present=st.integers(0, 2), which=WAYS, is_astray=st.booleans())
    def ask(self, num_tokens: int, num_present: int, which: int, is_astray: bool = False) -> None:
        self.do(self._ask(num_tokens, num_present * BLOCK_TOKENS, which, is_astray))

    async def _ask(self, num_tokens: int, num_present: int, which: int, is_astray: bool = False) -> None:
        number = len(self.requests) + 1
        wanted = prompt(num_tokens, num_present=min(num_present, num_tokens - 1), seed=number)
        try:
            lease_id, prefill = number.to_bytes(16, "big"), self.pools.prefills[which]
            request = self.pools.decode.ask(wanted, lease_id, prefill, is_astray=is_astray)
        except OutOfBlocks:
            return
        self.requests.append(request)
        await settle()

    @rule(place=PLACES, leaves=st.booleans())
    def end(self, place: int, leaves: bool) -> None:
        """A client goes away; or an answer is complete, as soon as it has begun."""
        request = self.requests[place % len(self.requests)]
        if leaves and not self.is_calm:
            request.task.cancel()
        request.may_end.set()
        self.do(settle())

    @rule()
    @stormy
    def give_way(self) -> None:
        """An older sequence wants blocks."""
        lease = self.pools.decode.desk.table.youngest_unclaimed
        if lease is not None:
            lease.cancel(OutOfBlocks("an older sequence needs the blocks"))
            self.do(settle())

    # --- what goes on -----------------------------------------------------------------------------------

    @rule(steps=st.integers(1, 6), held=HELD)
    def go_on(self, steps: int, held: str) -> None:
        """All frames in their order, and whatever waits for one to go on, what is held excepted."""
        for _ in range(steps):
            for wire in self.pools.wires:
                for way in (0, 1):
                    for envelope in wire.under_way[way][:]:
                        del wire.under_way[way][0]
                        self._deliver(wire, way, envelope)
            for what, gates in self._gates():
                for _ in gates.waiting[:] if what != held else ():
                    self._open(gates, 0)

    @rule(place=PLACES, way=WAYS, frames=st.integers(1, 12))
    def flow(self, place: int, way: int, frames: int) -> None:
        """Some frames in their order."""
        wire = self._wire(place)
        for envelope in wire.under_way[way][:frames]:
            del wire.under_way[way][0]
            self._deliver(wire, way, envelope)

    @rule(what=st.integers(0, 3), place=PLACES)
    def one_goes_on(self, what: int, place: int) -> None:
        """A prefill, a read or a copy."""
        self._open(self._gates()[what][1], place)

    @rule(seconds=st.sampled_from([0.5, 2.0, 6.0, 31.0]))
    @stormy
    def wait(self, seconds: float) -> None:
        self.do(self.pools.clock.advance(seconds))

    # --- what goes wrong --------------------------------------------------------------------------------

    @rule(fault=FAULTS)
    def arm(self, fault: FaultMaker) -> None:
        """It strikes when such a frame is sent."""
        kind, frame, number, times = fault
        self.pools.rules.append((Duplicate if self.is_calm else kind)(Nth(frame, number), times=times))

    @rule(place=PLACES, request=PLACES)
    def steal(self, place: int, request: int) -> None:
        """I4: somebody claims a lease that another one has."""
        lease, wire = self.requests[request % len(self.requests)].lease, self._wire(place)
        if lease is not None and lease.owner is not None and wire.has_greeted(0):
            owner = lease.owner
            self._deliver(wire, 0, Envelope(wire.owner.incarnation, Claim(lease.lease_id)))
            assert lease.owner == owner

    @rule(place=PLACES, way=WAYS, frame=PLACES, harm=st.sampled_from(["lose", "hurry", "double"]))
    def harm(self, place: int, way: int, frame: int, harm: str) -> None:
        wire = self._wire(place)
        frames = wire.under_way[way]
        if not frames:
            return
        frame %= len(frames)
        match "double" if self.is_calm else harm:
            case "lose":
                frames.pop(frame)
            case "hurry":
                self._deliver(wire, way, frames.pop(frame))
            case "double":
                frames.insert(frame, frames[frame])

    @rule(place=PLACES, said=PLACES)
    @precondition(lambda self: self.said)
    def haunt(self, place: int, said: int) -> None:
        """I5: what was said once is said again, by a process that isn't there."""
        way, envelope = self.said[-1 - said % len(self.said)]
        wire = self._wire(place)
        if wire.has_greeted(way):
            before = self._look()
            self._deliver(wire, way, Envelope(envelope.incarnation + 1000, envelope.frame))
            assert self._look() == before

    @rule(which=PLACES, how=st.sampled_from(["reset", "to decode", "to prefill", "cut", "killed", "frozen"]))
    @stormy
    def part(self, which: int, how: str) -> None:
        """A connection breaks, or passes nothing any more; a process is dead, or does all in vain."""
        wire, process = self._wire(which), self.pools.living[which % 3]
        match how:
            case "reset":
                self.do(wire.prefill.close())
                self.do(settle())
            case "killed":
                self.do(self.pools.kill(process))
            case "frozen":
                self.do(self.pools.cut_off(process))
            case _:
                wire.cut(*{"to decode": (0,), "to prefill": (1,), "cut": (0, 1)}[how])

    # --- what must hold ---------------------------------------------------------------------------------

    @invariant()
    def all_is_as_it_must_be(self) -> None:
        pools = self.pools
        # I1: no slot was another chunk's when it was read for a lease that waited for it.
        assert not [unloader.torn for decode in pools.all_decodes for unloader in decode.unloaders if unloader.torn]
        # I2: committed K/V are right and stay so, and nobody writes into blocks that aren't their request's.
        assert all(request.was_right is not False for request in self.requests)
        assert not [decode.blocks.strays for decode in pools.all_decodes if decode.blocks.strays]
        # I3: only open requests hold blocks.
        for decode in pools.all_decodes:
            held = [block for request in decode.requests if not request.task.done() for block in request.wanted.blocks]
            assert decode.allocator.num_used == len(held) == len(set(held))
        assert all(prefill.serving or prefill.allocator.num_used == 0 for prefill in pools.all_prefills)
        # I4
        assert not [prefill.unaccepted for prefill in pools.all_prefills if prefill.unaccepted]

    def teardown(self) -> None:
        try:
            if hasattr(self, "pools"):
                self.do(self._end())
        finally:
            self._close_loop()

    def _close_loop(self) -> None:
        """Also if the run has failed: what waits for the machine would wait for ever."""
        for task in (tasks := asyncio.all_tasks(self.loop)):
            task.cancel()
        self.do(asyncio.wait(tasks) if tasks else settle())
        self.loop.close()

    async def _end(self) -> None:
        """I3 and I6: the faults are over, and time goes on where there were any."""
        pools = self.pools
        pools.rules.clear()
        for request in self.requests:
            request.may_end.set()
        await pools.flow()
        if self.is_calm:
            assert all(request.was_right for request in self.requests)
        else:
            # Two waits may follow one another: for the greeting, then for the answer to a claim.
            await pools.wait(2 * TIMES.ttl_s)
            assert all(lease.owner is None for decode in pools.all_decodes for lease in decode.desk.table.uncommitted())
            await pools.wait(TIMES.claim_timeout_s)
        self.all_is_as_it_must_be()
        self._assert_nothing_held()
        for which in (0, 1):
            await self._ask(MAX_TOKENS, 0, which)
            self.requests[-1].may_end.set()
            await pools.flow()
            assert self.requests[-1].was_right, "faults that are over still do harm"
        await pools.close()
        self._assert_nothing_held()
        await asyncio.gather(*(request.task for request in self.requests), return_exceptions=True)
        assert asyncio.all_tasks() <= {asyncio.current_task()}

    def _assert_nothing_held(self) -> None:
        for request in self.requests:
            assert request.task.done(), request.lease
        for decode in self.pools.all_decodes:
            assert decode.desk.table.num_open == 0 and not decode.desk._copies
            assert decode.allocator.num_used == 0
        for prefill in self.pools.all_prefills:
            assert not prefill.serving
            assert prefill.allocator.num_used == 0
        assert not [loader for loader in self.pools.remote.loaders.values() if loader.num_lent and not loader.is_closed]

    # --- inside -----------------------------------------------------------------------------------------

    def _wire(self, place: int) -> Wire:
        """One of the last few, most of which live. There is one, since there is a request."""
        wires = self.pools.wires[-4:]
        return wires[place % len(wires)]

    def _deliver(self, wire: Wire, way: int, envelope: Envelope) -> None:
        self.said.append((way, envelope))
        self.do(wire.deliver(way, envelope))

    def _gates(self) -> list[tuple[str, Gates]]:
        steps = [("steps", prefill.steps) for prefill in self.pools.prefills]
        return [*steps, ("reads", self.pools.decode.reads), ("copies", self.pools.decode.blocks.copies)]

    def _open(self, gates: Gates, place: int) -> None:
        if gates.waiting:
            gates.open(place)
            self.do(settle())

    def _look(self) -> object:
        """All that a frame can change."""
        return [
            ({lease.lease_id: (lease.state, lease.num_copies) for lease in decode.desk.table._leases.values()},
             dict(decode.desk.table._deadlines), len(decode.reads.waiting))
            for decode in self.pools.all_decodes
        ] + [
            [(session.is_over, {key: vars(claim).copy() for key, claim in session._claims.items()})
             for session in prefill.sessions._living()]
            for prefill in self.pools.all_prefills
        ] + [[len(frames) for frames in wire.under_way] for wire in self.pools.wires]  # fmt: skip


HandoffMachine.TestCase.settings = examples(70, stateful_step_count=30, suppress_health_check=list(HealthCheck))
TestHandoffMachine = HandoffMachine.TestCase


def story(*asked: tuple[int, int], **ways: Any) -> HandoffMachine:
    calm = {"is_calm": False, "is_staged": False, "is_hidden": False, "faults": [], "steps": 12, "held": "nothing"}
    machine = HandoffMachine()
    machine.start(asked=list(asked), **calm | ways)
    return machine


@pytest.mark.parametrize("is_staged", [False, True])
@pytest.mark.parametrize("is_hidden", [False, True])
def test_the_machine_gets_to_commits(is_staged: bool, is_hidden: bool) -> None:
    """One that never commits anything would find nothing wrong."""
    machine = story((24, 0), (13, 1), is_calm=True, is_staged=is_staged, is_hidden=is_hidden)
    machine.teardown()
    assert [request.was_right for request in machine.requests] == [True] * 4


@pytest.mark.parametrize("kind", [Hello, Claim, Accepted, Seal])
def test_the_machine_ends_what_nothing_repairs(kind: type[Frame]) -> None:
    machine = story((24, 0), faults=[(Drop, kind, 0, 1)])
    machine.teardown()
    assert [request.was_right for request in machine.requests] == [None, True, True]


def test_the_machine_ends_what_was_given_up_unheard() -> None:
    """Beats go on; the claim's answer is lost, and that prefill waits no more, and no call brings it."""
    machine = story((24, 0), faults=[(Drop, Accepted, 0, 1), (Drop, Failed, 0, 1)], is_astray=True)
    for _ in range(12):
        machine.wait(0.5)
        machine.go_on(3, "nothing")
    machine.teardown()
    assert [request.was_right for request in machine.requests] == [None, True, True]


def test_the_machine_takes_slots_back_whose_cancel_was_lost() -> None:
    machine = story((24, 0), is_staged=True, held="copies", faults=[(Drop, Cancel, 0, 1)])
    assert sum(loader.num_lent for loader in machine.pools.remote.loaders.values())
    machine.end(0, leaves=True)
    machine.teardown()


def test_the_machine_takes_slots_back_however_often_cancel_is_lost() -> None:
    """Copies take so long that no credit comes, and both sides give up."""
    machine = story((24, 0), is_staged=True, held="copies", faults=[(Drop, Cancel, 0, 3)])
    for _ in range(12):
        machine.wait(0.5)
        machine.go_on(3, "copies")
    machine.teardown()


def test_the_machine_sees_a_byte_that_is_wrong() -> None:
    machine = story((24, 0), is_calm=True)
    machine.go_on(10, "nothing")
    machine.pools.decode.blocks.memory[machine.requests[0].wanted.blocks[0], 0, 1] ^= 1
    with pytest.raises(AssertionError):
        machine.teardown()


def test_the_machine_sees_a_write_into_blocks_of_another() -> None:
    machine = story((24, 0), held="copies")
    machine.pools.decode.blocks.holders[machine.requests[0].wanted.blocks[0]] = b"another"
    machine.go_on(1, "nothing")
    with pytest.raises(AssertionError):
        machine.teardown()
