"""Sessions whose payload decode reads through NIXL: how they agree on it, what goes wrong, and what is left."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace

import pytest
from kv_prompts import PLAN, lease_id, prompt
from raw_peer import RawPeer, chunk, staged
from transfer_helpers import MAX_FRAME_BYTES, Rig, disconnect, needs_nixl, rig

from shoal.errors import PeerGone, ProtocolViolation, ShoalError
from shoal.handoff import decode_session
from shoal.handoff.base import prompt_hash
from shoal.handoff.carriers.nixl.agent import Agent
from shoal.handoff.carriers.nixl.loader import NixlLoader
from shoal.handoff.carriers.nixl.process import Nixl
from shoal.handoff.carriers.nixl.unloader import NixlUnloader
from shoal.handoff.decode_session import Attach
from shoal.handoff.session import PROTOCOL_VERSION
from shoal.wire.handoff_messages import (
    Accepted,
    Cancel,
    Carrier,
    CarrierReason,
    Chunk,
    Claim,
    Committed,
    Credit,
    Hello,
    Nack,
    Refused,
    RemoteSegment,
    Seal,
)

pytestmark = needs_nixl
KIND = "memory+nixl"
AUTO = "memory+shm+nixl"


def find_nothing(both: Rig) -> None:
    """Decode is on another host."""
    both.server._attach = replace(both.server._attach, local=lambda segment: None)


# --- what the two agree on ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KIND, "grpc+nixl"])
async def test_where_it_is_asked_for_all_payload_is_read(kind: str) -> None:
    async with rig(kind) as both:
        session = await both.pool.get(both.address)
        assert (session.carrier, session.carrier_reason) == (Carrier.NIXL, CarrierReason.CONFIGURED)
        arrived = await both.hand_off(prompt())
        both.assert_arrived(prompt())
        assert both.counts.bytes_by_carrier == {Carrier.NIXL: arrived.num_bytes.total}
        assert both.nixl_loaders[0].num_lent == 0
        assert both.nixl[1].num_readers == 1


async def test_on_one_host_auto_is_shm_and_no_agent_is_made() -> None:
    async with rig(AUTO) as both:
        session = await both.pool.get("memory")
        assert (session.carrier, session.carrier_reason) == (Carrier.SHM, CarrierReason.SAME_HOST)
        await both.hand_off(prompt())
        assert not both.nixl_loaders


@pytest.mark.parametrize("kind", [AUTO, "grpc+shm+nixl"])
async def test_on_two_hosts_auto_is_nixl(kind: str) -> None:
    async with rig(kind) as both:
        find_nothing(both)
        session = await both.pool.get(both.address)
        assert (session.carrier, session.carrier_reason) == (Carrier.NIXL, CarrierReason.OTHER_HOST)
        assert both.loaders[0]._memory.closed
        await both.hand_off(prompt())
        both.assert_arrived(prompt())
        assert set(both.counts.bytes_by_carrier) == {Carrier.NIXL}


@pytest.mark.parametrize("kind", [KIND, AUTO, "grpc+shm+nixl"])
async def test_a_decode_that_cannot_read_gets_all_inline(kind: str) -> None:
    async def find_none(segment: RemoteSegment, failed: object) -> None:
        return None

    async with rig(kind) as both:
        both.server._attach = Attach(lambda segment: None, find_none)
        session = await both.pool.get(both.address)
        assert (session.carrier, session.carrier_reason) == (Carrier.INLINE, CarrierReason.NO_NIXL)
        assert len(both.nixl_loaders) == 1
        peer = next(iter(both.server._sessions)).peer
        assert peer is not None and peer.has_nixl == (kind == KIND)  # in the second greeting there's nothing more
        await both.hand_off(prompt())
        assert set(both.counts.bytes_by_carrier) == {Carrier.INLINE}


@pytest.mark.parametrize("kind", [KIND, AUTO])
async def test_where_no_agent_can_be_made_all_goes_inline(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "no_such_transport")
    async with rig(kind) as both:
        find_nothing(both)
        session = await both.pool.get("memory")
        assert (session.carrier, session.carrier_reason) == (Carrier.INLINE, CarrierReason.NO_NIXL)
        assert not both.nixl_loaders
        await both.hand_off(prompt())
        both.assert_arrived(prompt())


async def test_what_might_have_to_be_retired_is_bounded_and_beyond_it_all_goes_inline() -> None:
    async with rig(KIND) as both:
        both.nixl[1]._retired._max_bytes = 4 * (64 + MAX_FRAME_BYTES)  # one session's
        first = await both.pool.get("memory")
        second = RawPeer(await both.connect("memory"))
        async with offered(both) as loader:
            assert (await greet(second, loader.segment)).remote is None
        assert first.carrier is Carrier.NIXL
        await first.close()
        await second.channel.close()
        assert (await both.pool.get("memory")).carrier is Carrier.NIXL


def test_no_two_agents_have_one_name_and_none_can_be_guessed() -> None:
    names = {Agent()._agent.name for _ in range(2)}
    assert len(names) == 2
    assert {len(name) for name in names} == {len("shoal-") + 32}


# --- a prefill that says whatever a test wants ----------------------------------------------------------


@asynccontextmanager
async def offered(both: Rig) -> AsyncIterator[NixlLoader]:
    loader = await both.nixl[0].open_loader(MAX_FRAME_BYTES, 5 * 4096)
    yield loader
    loader.close()


async def greet(peer: RawPeer, segment: RemoteSegment) -> Hello:
    await peer.send(Hello(PROTOCOL_VERSION, (PLAN,), peer="raw", remote=segment, has_nixl=True))
    return await peer.expect(Hello)


@asynccontextmanager
async def reading(both: Rig, new_id: bytes) -> AsyncIterator[tuple[RawPeer, NixlLoader]]:
    """A peer that has claimed ``new_id``."""
    peer = RawPeer(await both.connect("memory"))
    async with offered(both) as loader:
        assert (await greet(peer, loader.segment)).remote == loader.segment
        loader.hide()
        await peer.send(Claim(new_id))
        await peer.expect(Accepted)
        yield peer, loader
        await peer.channel.close()


@contextmanager
def held_up(nixl: Nixl) -> Iterator[None]:
    """Its thread does nothing."""
    gate = threading.Event()
    nixl._thread.submit(gate.wait)
    try:
        yield
    finally:
        gate.set()


@pytest.mark.parametrize(
    "change",
    [{"nonce": bytes(16)}, {"address": 1 << 62}, {"agent": b"\xff" * 300}, {"agent": b"x"}],
    ids=lambda change: next(iter(change)),
)
async def test_memory_that_is_not_as_it_was_announced_is_not_read(change: dict[str, object]) -> None:
    async with rig(KIND) as both:
        peer = RawPeer(await both.connect("memory"))
        async with offered(both) as loader:
            assert (await greet(peer, replace(loader.segment, **change))).remote is None  # type: ignore[arg-type]
        await peer.channel.close()
        await both.hand_off(prompt())
        both.assert_arrived(prompt())


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
    new_id, other, wanted = lease_id(), lease_id(), prompt(9, seed=1)
    async with (
        rig(KIND) as both,
        both.open(new_id, prompt(9)) as lease,
        both.open(other, wanted) as unharmed,
        reading(both, new_id) as (peer, loader),
    ):
        await peer.send(staged(loader, new_id, **place))
        assert words in (await peer.expect(Cancel)).reason
        with pytest.raises(ProtocolViolation, match=words):
            await lease.arrived()
        await peer.send(Claim(other))
        await peer.expect(Accepted)
        await peer.send(staged(loader, other))
        await peer.expect(Credit)
        await peer.send(Seal(other, 1, prompt_hash(wanted.token_ids), wanted.token_ids[-1], 0.0, 0.0))
        await peer.expect(Committed)
        await unharmed.arrived()


async def test_a_slot_beyond_what_is_registered_ends_the_session() -> None:
    """It said that it has more slots than it has."""
    new_id = lease_id()
    async with rig(KIND) as both, both.open(new_id, prompt(9)) as lease, offered(both) as loader:
        peer = RawPeer(await both.connect("memory"))
        lie = replace(loader.segment, num_slots=100)
        assert (await greet(peer, lie)).remote == lie
        await peer.send(Claim(new_id))
        await peer.expect(Accepted)
        await peer.send(staged(loader, new_id, slot=99))
        with pytest.raises(PeerGone, match="can't be read any more"):
            await lease.arrived()
        assert isinstance(await peer.until_gone(), ShoalError)
        await both.hand_off(prompt(seed=1))


async def test_a_stale_generation_is_asked_for_once_more() -> None:
    new_id, wanted = lease_id(), prompt(9)
    async with rig(KIND) as both, both.open(new_id, wanted) as lease, reading(both, new_id) as (peer, loader):
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


async def test_a_seal_waits_for_reads_and_what_comes_again_meanwhile_is_read_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    new_id, wanted = lease_id(), prompt(17)
    unload, read = NixlUnloader.unload, []

    def note(unloader: NixlUnloader, one: Chunk, *arguments: object) -> None:
        read.append(one.seq)
        unload(unloader, one, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(NixlUnloader, "unload", note)
    async with rig(KIND) as both, both.open(new_id, wanted) as lease, reading(both, new_id) as (peer, loader):
        first, second = staged(loader, new_id), staged(loader, new_id, 1, (8, 16))
        with held_up(both.nixl[1]):
            await peer.send(first, first, second, second)
            await peer.send(Seal(new_id, 2, prompt_hash(wanted.token_ids), wanted.token_ids[-1], 0.0, 0.0))
        assert [(await peer.expect(Credit)).seq for _ in range(2)] == [0, 1]
        await peer.expect(Committed)
        await lease.arrived()
    assert read == [0, 1]
    assert both.counts.events["verify:checksum"] == 0


async def test_reads_beyond_the_credit_fail_the_lease() -> None:
    new_id = lease_id()
    async with (
        rig(KIND, credit_bytes=2048) as both,
        both.open(new_id, prompt(41)) as lease,
        reading(both, new_id) as (peer, loader),
    ):
        chunks = [staged(loader, new_id, seq, (8 * seq, 8 * seq + 8)) for seq in range(3)]
        with held_up(both.nixl[1]):
            await peer.send(*chunks)
            assert "beyond the credit of 2048" in (await peer.expect(Cancel)).reason
            with pytest.raises(ProtocolViolation, match="beyond the credit"):
                await lease.arrived()


async def test_what_comes_behind_a_read_counts_against_the_credit_too() -> None:
    """And once its lease has failed, nothing is kept for it."""
    new_id, other = lease_id(), lease_id()
    async with (
        rig(KIND, credit_bytes=2048) as both,
        both.open(new_id, prompt(41)) as lease,
        reading(both, new_id) as (peer, loader),
    ):
        with held_up(both.nixl[1]):
            await peer.send(
                staged(loader, new_id), *(chunk(new_id, seq, (8, 16)) for seq in range(1, 40)), Claim(other)
            )
            assert "wait for what is fetched" in (await peer.expect(Cancel)).reason
            while not isinstance(await peer.receive(), Refused):
                pass  # each of the others is told that the lease has ended
            [session] = both.server._sessions
            assert session.num_dropped == 38 and session._arrivals.num_waiting(new_id) == 2
            with pytest.raises(ProtocolViolation, match="wait for what is fetched"):
                await lease.arrived()


async def test_frames_without_payload_do_not_pile_up_behind_a_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_session, "MAX_WAITING_FRAMES", 5)
    new_id, wanted = lease_id(), prompt(9)
    seal = Seal(new_id, 1, prompt_hash(wanted.token_ids), wanted.token_ids[-1], 0.0, 0.0)
    async with rig(KIND) as both, both.open(new_id, wanted) as lease, reading(both, new_id) as (peer, loader):
        with held_up(both.nixl[1]):
            await peer.send(staged(loader, new_id), *[seal] * 8)
            await peer.expect(Cancel)
            with pytest.raises(ProtocolViolation, match="5 frames"):
                await lease.arrived()


async def test_what_is_read_for_a_lease_that_has_ended_is_written_nowhere() -> None:
    new_id = lease_id()
    async with rig(KIND) as both, both.open(new_id, prompt(9)) as lease, reading(both, new_id) as (peer, loader):
        with held_up(both.nixl[1]):
            await peer.send(staged(loader, new_id))
            await both.counts.reached("streaming")
            await lease.cancel("the client left")
            await peer.expect(Cancel)
        await on_thread(both.nixl[1])
        await both.hand_off(prompt(seed=1))
        assert set(both.sink.written) == {prompt(seed=1).blocks}


# --- somebody stops, or dies ----------------------------------------------------------------------------


async def on_thread(nixl: Nixl) -> None:
    """All that was submitted has been done."""
    await asyncio.wrap_future(nixl._thread.submit(lambda: None))


@pytest.mark.parametrize("turns", [0, 3, 21, 144])
@pytest.mark.parametrize("end", ["prefill", "decode"])
async def test_whoever_disconnects_at_any_moment_leaves_nothing(end: str, turns: int) -> None:
    await disconnect("grpc+nixl", end, turns)
