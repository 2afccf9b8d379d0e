"""Sessions whose payload goes through shared memory: how they agree on it, what goes wrong, and what is left."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from fake_clock import FakeClock, settle
from kv_prompts import PLAN, TOKEN_BYTES, lease_id, piece_of, prompt
from raw_peer import RawPeer, chunk, staged
from transfer_helpers import MAX_FRAME_BYTES, TIMES, Rig, rig

from shoal.errors import ChecksumMismatch, HandoffError, LeaseLost, PeerGone, ProtocolViolation
from shoal.handoff.base import prompt_hash
from shoal.handoff.carriers.shm import ShmLoader
from shoal.handoff.channels.faults import Drop
from shoal.handoff.channels.memory import memory_pair
from shoal.handoff.decode_session import Attach
from shoal.handoff.offer import Staging
from shoal.handoff.prefill_side import PrefillSession
from shoal.handoff.session import PROTOCOL_VERSION, Identity
from shoal.wire.handoff_messages import (
    Accepted,
    Cancel,
    Carrier,
    CarrierReason,
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
    StagedPayload,
)

KIND = "memory+shm"


# --- what the two agree on ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KIND, "grpc+shm"])
async def test_on_one_host_all_payload_is_staged_and_no_name_is_left(kind: str) -> None:
    async with rig(kind) as both:
        session = await both.pool.get(both.address)
        assert (session.carrier, session.carrier_reason) == (Carrier.SHM, CarrierReason.SAME_HOST)
        assert not list(both.folder.iterdir())  # a crash of either leaves nothing from here on
        arrived = await both.hand_off(prompt())
        both.assert_arrived(prompt())
        assert both.counts.bytes_by_carrier == {Carrier.SHM: arrived.num_bytes.total}
        assert both.loaders[0].num_lent == 0


@pytest.mark.parametrize("kind", [KIND, "grpc+shm"])
async def test_a_decode_that_does_not_find_the_segment_gets_all_inline(kind: str) -> None:
    async with rig(kind) as both:
        both.server._attach = Attach(lambda segment: None)
        session = await both.pool.get(both.address)
        assert (session.carrier, session.carrier_reason) == (Carrier.INLINE, CarrierReason.OTHER_HOST)
        assert both.loaders[0]._memory.closed
        await both.hand_off(prompt())
        both.assert_arrived(prompt())
        assert set(both.counts.bytes_by_carrier) == {Carrier.INLINE}


async def test_without_room_all_goes_inline() -> None:
    def full() -> ShmLoader:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with rig(KIND) as both:
        both.pool._staging = Staging(full)
        session = await both.pool.get("memory")
        assert (session.carrier, session.carrier_reason) == (Carrier.INLINE, CarrierReason.NO_ROOM)
        await both.hand_off(prompt())


async def test_leases_wait_for_one_anothers_slots() -> None:
    prompts = [prompt(60, seed=seed) for seed in range(4)]
    async with rig(KIND, num_slots=1) as both:
        await asyncio.gather(*(both.hand_off(wanted) for wanted in prompts))
        for wanted in prompts:
            both.assert_arrived(wanted)
        assert set(both.counts.bytes_by_carrier) == {Carrier.SHM}


async def test_a_prefill_that_finds_no_slot_for_too_long_gives_up() -> None:
    clock = FakeClock()
    async with rig(KIND, num_slots=1, clock=clock, decode_sends=Drop(Cancel, times=99)) as both:
        session = await both.pool.get("memory")
        session.loader.load(piece_of(chunk(lease_id(), 0, (0, 1))))  # of which decode says in vain that it has ended
        task = asyncio.ensure_future(both.hand_off(prompt()))
        await clock.advance(TIMES.ttl_s)
        with pytest.raises(LeaseLost, match="no credit"):
            await task


async def test_a_refused_peer_leaves_no_segment() -> None:
    async with rig(KIND, prefill_plans=("plan-b",)) as both:
        with pytest.raises(HandoffError):
            await both.pool.get("memory")
        assert len(both.loaders) == 1
        assert not list(both.folder.iterdir())


# --- a decode that says whatever a test wants -----------------------------------------------------------


@asynccontextmanager
async def staging_session(folder: Path, num_slots: int = 2) -> AsyncIterator[tuple[PrefillSession, RawPeer, ShmLoader]]:
    loader = ShmLoader.create(100, (1 + num_slots) * mmap.PAGESIZE, folder)
    channel, other = memory_pair()
    decode = RawPeer(other)
    await decode.send(Hello(PROTOCOL_VERSION, (PLAN,), segment=loader.segment))
    session = await PrefillSession.open(
        channel,
        Identity(5, (PLAN,)),
        ttl_s=5.0,
        max_frame_bytes=100,
        clock=FakeClock(),
        staging=Staging(lambda: loader),
    )
    assert (await decode.expect(Hello)).segment == loader.segment
    yield session, decode, loader
    await session.close()


async def test_slots_of_a_claim_that_was_left_come_back_with_decodes_answer(tmp_path: Path) -> None:
    new_id = bytes(16)
    async with staging_session(tmp_path) as (session, decode, loader):

        async def leave() -> None:
            async with session.claim(new_id) as claim:
                await claim.send(0, 1, 0, 2, memoryview(bytes(200)))

        work = asyncio.ensure_future(leave())
        await decode.expect(Claim)
        await decode.send(Accepted(new_id, tuple(range(9)), 0, 1000, 5.0))
        assert all([(await decode.expect(Chunk)).staged for _ in range(2)])
        await work
        await decode.expect(Failed)
        await settle()
        assert loader.num_lent == 2  # decode may be reading them
        await decode.send(Credit(new_id, 0, 100))
        await settle()
        assert loader.num_lent == 1
        await decode.send(Cancel(new_id, "prefill gave the prompt up"))
        await settle()
        assert loader.num_lent == 0


@pytest.mark.parametrize("kind", [Accepted, Seal, Committed, Credit])
async def test_a_frame_is_not_waited_for_longer_because_others_get_slots(kind: type[Frame]) -> None:
    """Who waits for a slot looks again when there is one. Who waits for something else doesn't."""
    clock, lost = FakeClock(), Drop(kind)
    sends: dict[str, Drop] = {"prefill_sends" if kind is Seal else "decode_sends": lost}
    num_slots = 2 if kind is Credit else 1  # of which it keeps one
    async with rig(KIND, num_slots=num_slots, clock=clock, credit_bytes=MAX_FRAME_BYTES, **sends) as both:  # type: ignore[arg-type]
        wanted, new_id = prompt(), lease_id()
        async with both.open(new_id, wanted):
            call = asyncio.ensure_future(both.prefill(new_id, wanted))
            async with asyncio.timeout(10):
                while lost.num_left:
                    await settle()
            for seed in range(1, 7):
                assert not call.done()
                await both.hand_off(prompt(seed=seed))
                await clock.advance(TIMES.ttl_s / 6)
            assert call.done()
            with pytest.raises(LeaseLost, match=r"no .* from decode for 5 s"):
                await call


# --- a prefill that says whatever a test wants ----------------------------------------------------------


@asynccontextmanager
async def staging_peer(both: Rig) -> AsyncIterator[tuple[RawPeer, ShmLoader]]:
    loader = ShmLoader.create(MAX_FRAME_BYTES, 5 * mmap.PAGESIZE, both.folder)
    peer = RawPeer(await both.connect("memory"))
    await peer.send(Hello(PROTOCOL_VERSION, (PLAN,), peer="raw", segment=loader.segment))
    assert (await peer.expect(Hello)).segment == loader.segment
    loader.hide()
    yield peer, loader
    await peer.channel.close()
    loader.close()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ({"slot": 4}, "there are 4 slots"),
        ({"slot": 2**31 - 1}, "there are 4 slots"),
        ({"num_bytes": MAX_FRAME_BYTES + 1}, "there are 4 slots"),
        ({"num_bytes": 8}, "bytes where its ranges need"),
    ],
    ids=str,
)
async def test_a_place_that_cannot_be_fails_its_lease_alone(place: dict[str, int], words: str) -> None:
    new_id = lease_id()
    async with rig(KIND) as both, staging_peer(both) as (peer, loader), both.open(new_id, prompt(9)) as lease:
        await peer.send(Claim(new_id))
        await peer.expect(Accepted)
        await peer.send(staged(loader, new_id, **place))
        assert words in (await peer.expect(Cancel)).reason
        with pytest.raises(ProtocolViolation, match=words):
            await lease.arrived()
        await both.hand_off(prompt(seed=1))


async def test_a_stale_generation_is_asked_for_once_more() -> None:
    new_id, wanted = lease_id(), prompt(9)
    async with rig(KIND) as both, staging_peer(both) as (peer, loader), both.open(new_id, wanted) as lease:
        await peer.send(Claim(new_id))
        await peer.expect(Accepted)
        good = staged(loader, new_id)
        assert good.staged is not None
        await peer.send(replace(good, staged=replace(good.staged, generation=2)))
        assert (await peer.expect(Nack)).seq == 0
        assert not both.sink.written
        await peer.send(good)
        await peer.expect(Credit)
        await peer.send(Seal(new_id, 1, prompt_hash(wanted.token_ids), wanted.token_ids[-1], 0.0, 0.0))
        await peer.expect(Committed)
        await lease.arrived()


async def test_a_chunk_that_comes_again_when_its_slot_is_another_chunks_changes_nothing() -> None:
    new_id, wanted = lease_id(), prompt(17)
    async with rig(KIND) as both, staging_peer(both) as (peer, loader), both.open(new_id, wanted) as lease:
        await peer.send(Claim(new_id))
        await peer.expect(Accepted)
        first = staged(loader, new_id)
        await peer.send(first)
        await peer.expect(Credit)
        loader.credited(new_id, 0)
        second = staged(loader, new_id, 1, (8, 16))
        assert (first.staged, second.staged) == (StagedPayload(3, 1, 1024), StagedPayload(3, 2, 1024))
        await peer.send(first, second, first)
        assert (await peer.expect(Credit)).seq == 1
        await peer.send(Seal(new_id, 2, prompt_hash(wanted.token_ids), wanted.token_ids[-1], 0.0, 0.0))
        await peer.expect(Committed)
        await lease.arrived()
    assert both.counts.events["verify:checksum"] == 0


async def test_a_staged_chunk_in_a_session_without_a_segment_fails_its_lease() -> None:
    new_id = lease_id()
    async with rig(KIND) as both, both.open(new_id, prompt(9)) as lease:
        peer = RawPeer(await both.connect("memory"))
        await peer.greet()
        await peer.send(Claim(new_id))
        await peer.expect(Accepted)
        bad = replace(chunk(new_id, 0, (0, 8)), payload=b"", staged=StagedPayload(0, 1, 8 * 4 * TOKEN_BYTES))
        await peer.send(bad)
        with pytest.raises(ProtocolViolation, match="this session has none"):
            await lease.arrived()
        await peer.channel.close()


async def copying(both: Rig, peer: RawPeer, loader: ShmLoader, new_id: bytes) -> Chunk:
    """The copy of a good chunk, held up before it begins; the chunk as it was sent."""
    await peer.send(Claim(new_id))
    await peer.expect(Accepted)
    both.sink.gate.clear()
    good = staged(loader, new_id)
    await peer.send(good)
    await both.sink.started.wait()
    return good


async def test_a_slot_that_is_used_again_before_it_was_copied_is_asked_for_once_more() -> None:
    new_id, wanted = lease_id(), prompt(9)
    async with rig(KIND) as both, staging_peer(both) as (peer, loader), both.open(new_id, wanted) as lease:
        await copying(both, peer, loader, new_id)
        loader.credited(new_id, 0)  # though there was none
        again = staged(loader, new_id)  # the same bytes under another generation
        both.sink.gate.set()
        assert (await peer.expect(Nack)).seq == 0
        assert not both.sink.written
        await peer.send(again, Seal(new_id, 1, prompt_hash(wanted.token_ids), wanted.token_ids[-1], 0.0, 0.0))
        await peer.expect(Credit)
        await peer.expect(Committed)
        await lease.arrived()


async def test_a_segment_that_is_cut_before_the_copy_kills_nobody() -> None:
    new_id = lease_id()
    async with rig(KIND) as both:
        loader = ShmLoader.create(MAX_FRAME_BYTES, 5 * mmap.PAGESIZE, both.folder)
        file = os.open(loader._path, os.O_RDWR)
        peer = RawPeer(await both.connect("memory"))
        await peer.send(Hello(PROTOCOL_VERSION, (PLAN,), peer="raw", segment=loader.segment))
        await peer.expect(Hello)
        async with both.open(new_id, prompt(9)) as lease:
            await copying(both, peer, loader, new_id)
            os.ftruncate(file, mmap.PAGESIZE)
            both.sink.gate.set()
            assert (await peer.expect(Nack)).seq == 0
            await peer.send(Failed(new_id, "enough"))
            with pytest.raises(HandoffError, match="enough"):
                await lease.arrived()
        assert not both.sink.written
        os.close(file)
        await peer.channel.close()
        loader.close()


async def test_a_session_that_ends_before_the_copy_leaves_the_blocks_as_they_were() -> None:
    new_id = lease_id()
    async with rig(KIND) as both:
        async with staging_peer(both) as (peer, loader), both.open(new_id, prompt(9)) as lease:
            await copying(both, peer, loader, new_id)
            await peer.channel.close()
            with pytest.raises(PeerGone):
                await lease.arrived()
            both.sink.gate.set()
        assert not both.sink.written
        both.assert_nothing_held()


# --- memory that goes bad -------------------------------------------------------------------------------


class SpoiltSlot:
    """Flips a bit in the slot of chunk 3, ``times`` times; with two, it's good again."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.loaders: list[ShmLoader] = []

    def __call__(self, envelope: Envelope) -> tuple[Envelope, ...]:
        frame = envelope.frame
        if isinstance(frame, Chunk) and frame.seq == 3 and frame.staged is not None and self.times:
            self.times -= 1
            memory = self.loaders[-1]._memory
            memory[mmap.PAGESIZE * (1 + frame.staged.slot) + 64] ^= 1
        return (envelope,)


async def test_a_spoilt_slot_is_noticed_and_never_read_from() -> None:
    spoil = SpoiltSlot(1)
    async with rig(KIND, prefill_sends=spoil) as both:
        spoil.loaders = both.loaders
        with pytest.raises(ChecksumMismatch):
            await both.hand_off(prompt())
        both.assert_nothing_held()
        await both.hand_off(prompt(seed=1))
        both.assert_arrived(prompt(seed=1))
        assert both.loaders[0].num_lent == 0
    assert both.counts.events["verify:checksum"] == 2
