"""A prefill process that breaks the rules: decode ends what is wrong, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import grpc.aio
import pytest
from fake_clock import settle
from kv_prompts import PLAN, TOKEN_BYTES, lease_id, prompt
from raw_peer import RawPeer, chunk
from transfer_helpers import Rig, rig

from shoal.errors import HandoffError, ProtocolViolation
from shoal.handoff import session
from shoal.handoff.base import prompt_hash
from shoal.handoff.channels.memory import memory_pair
from shoal.handoff.decode_session import DecodeSession
from shoal.handoff.lease import LeaseState
from shoal.handoff.session import Identity
from shoal.wire.handoff_messages import (
    Accepted,
    Cancel,
    Claim,
    Committed,
    Credit,
    Envelope,
    Failed,
    Frame,
    Hello,
    Nack,
    Refused,
    Seal,
)

WANTED = prompt(21)


def seal(new_id: bytes, num_chunks: int) -> Seal:
    return Seal(new_id, num_chunks, prompt_hash(WANTED.token_ids), WANTED.token_ids[-1], 0.0, 0.0)


@pytest.fixture
async def both() -> AsyncIterator[Rig]:
    async with rig() as opened:
        yield opened


@pytest.fixture
async def peer(both: Rig) -> AsyncIterator[RawPeer]:
    raw = RawPeer(await both.connect("memory"))
    await raw.greet()
    yield raw
    await raw.channel.close()


async def claimed(peer: RawPeer, new_id: bytes) -> None:
    await peer.send(Claim(new_id))
    accepted = await peer.expect(Accepted)
    assert accepted.token_ids == WANTED.token_ids


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda i: chunk(i, 1, (5, 15)), "overlap"),
        (lambda i: chunk(i, 1, (9, 11), (3, 4)), "overlap"),
        (lambda i: chunk(i, 1, (10, 21)), "outside"),
        (lambda i: chunk(i, 1, (10, 20), (0, 5)), "outside"),
        (lambda i: chunk(i, 80, (10, 20)), "chunk 80 of at most 80"),
        (lambda i: replace(chunk(i, 1, (10, 20)), token_end=19), "bytes where its ranges need"),
        (lambda i: chunk(i, 1, (10, 20), payload=b""), "bytes where its ranges need"),
    ],
)
async def test_a_chunk_that_does_not_fit_fails_its_lease(both: Rig, peer: RawPeer, bad: object, words: str) -> None:
    new_id = lease_id()
    async with both.open(new_id, WANTED) as lease:
        await claimed(peer, new_id)
        await peer.send(chunk(new_id, 0, (0, 10)))
        await peer.expect(Credit)
        await peer.send(bad(new_id))  # type: ignore[operator]
        cancelled = await peer.expect(Cancel)
        assert words in cancelled.reason
        with pytest.raises(ProtocolViolation, match=words):
            await lease.arrived()
    await both.hand_off(prompt(seed=1))  # others are not harmed


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"prompt_hash": bytes(32)}, "prompt_hash"),
        ({"boundary_token_id": 1001}, "boundary_token"),
        ({"num_chunks": 0}, "tiling"),
        ({"num_chunks": 81}, "tiling"),
        ({"num_chunks": 2**31 - 1}, "tiling"),
    ],
)
async def test_a_seal_that_does_not_match_publishes_nothing(
    both: Rig, peer: RawPeer, changes: dict[str, object], check: str
) -> None:
    new_id = lease_id()
    async with both.open(new_id, WANTED) as lease:
        await claimed(peer, new_id)
        await peer.send(chunk(new_id, 0, (0, 20)))
        await peer.expect(Credit)
        await peer.send(replace(seal(new_id, 1), **changes))  # type: ignore[arg-type]
        await peer.expect(Cancel)
        with pytest.raises(ProtocolViolation):
            await lease.arrived()
    assert both.counts.events[f"verify:{check}"] == 1
    assert both.counts.events["committed"] == 0


async def test_no_more_of_a_prompt_was_cached_than_it_has(both: Rig, peer: RawPeer) -> None:
    new_id = lease_id()
    async with both.open(new_id, WANTED) as lease:
        await claimed(peer, new_id)
        await peer.send(chunk(new_id, 0, (0, 20)))
        await peer.expect(Credit)
        await peer.send(replace(seal(new_id, 1), num_cached_tokens=len(WANTED.token_ids)))
        await peer.expect(Cancel)
        with pytest.raises(ProtocolViolation, match="21 cached tokens of a prompt of 21"):
            await lease.arrived()
    assert both.counts.events["committed"] == 0


@pytest.mark.parametrize("gap", [[(0, 19)], [(1, 20)], [(0, 9), (10, 20)]])
async def test_chunks_that_leave_a_gap_publish_nothing(both: Rig, peer: RawPeer, gap: list[tuple[int, int]]) -> None:
    new_id = lease_id()
    async with both.open(new_id, WANTED) as lease:
        await claimed(peer, new_id)
        for seq, tokens in enumerate(gap):
            await peer.send(chunk(new_id, seq, tokens))
            await peer.expect(Credit)
        await peer.send(seal(new_id, len(gap)))
        await peer.expect(Cancel)
        with pytest.raises(ProtocolViolation, match="of 80 token-layers arrived"):
            await lease.arrived()
    assert both.counts.events["verify:tiling"] == 1


async def test_more_bytes_than_the_credit_fail_the_lease(both: Rig, peer: RawPeer) -> None:
    new_id = lease_id()
    both.sink.gate.clear()
    async with both.open(new_id, prompt(101)) as lease:
        await peer.send(Claim(new_id))
        credit_bytes = (await peer.expect(Accepted)).credit_bytes
        step = credit_bytes // (4 * TOKEN_BYTES) // 2
        await peer.send(*(chunk(new_id, seq, (seq * step, (seq + 1) * step)) for seq in range(3)))
        await peer.expect(Cancel)
        both.sink.gate.set()
        with pytest.raises(ProtocolViolation, match="beyond the credit"):
            await lease.arrived()


async def test_sealing_twice_differently_fails_the_lease(both: Rig, peer: RawPeer) -> None:
    new_id = lease_id()
    async with both.open(new_id, WANTED) as lease:
        await claimed(peer, new_id)
        await peer.send(seal(new_id, 1), seal(new_id, 2))
        assert (await peer.expect(Nack)).seq == 0
        await peer.expect(Cancel)
        with pytest.raises(ProtocolViolation, match="sealed twice"):
            await lease.arrived()


async def test_a_chunk_after_the_seal_must_be_one_that_was_sealed(both: Rig, peer: RawPeer) -> None:
    new_id = lease_id()
    async with both.open(new_id, WANTED) as lease:
        await claimed(peer, new_id)
        await peer.send(seal(new_id, 2), chunk(new_id, 2, (0, 10)))
        with pytest.raises(ProtocolViolation, match="chunk 2 of at most 2"):
            await lease.arrived()


async def test_chunks_may_come_after_the_seal_and_are_asked_for_once(both: Rig, peer: RawPeer) -> None:
    new_id = lease_id()
    async with both.open(new_id, WANTED) as lease:
        await claimed(peer, new_id)
        await peer.send(chunk(new_id, 1, (10, 20)), seal(new_id, 2), seal(new_id, 2))
        frames = [await peer.receive() for _ in range(2)]
        assert {type(frame) for frame in frames} == {Nack, Credit}
        await peer.send(chunk(new_id, 0, (0, 10)))
        await peer.expect(Credit)
        await peer.expect(Committed)
        assert (await lease.arrived()).num_chunks == 2


async def test_a_corrupt_chunk_covers_nothing(both: Rig, peer: RawPeer) -> None:
    new_id = lease_id()
    async with both.open(new_id, WANTED) as lease:
        await claimed(peer, new_id)
        await peer.send(chunk(new_id, 0, (0, 20), crc32c=1))
        assert (await peer.expect(Nack)).seq == 0
        assert not lease.lease.is_complete and lease.lease._coverage.num_covered == 0
        await peer.send(chunk(new_id, 0, (0, 20)))
        await peer.expect(Credit)
        await peer.send(seal(new_id, 1))
        await peer.expect(Committed)
        await lease.arrived()


async def test_a_session_cannot_touch_the_leases_of_another(both: Rig, peer: RawPeer) -> None:
    new_id = lease_id()
    thief = RawPeer(await both.connect("memory"), incarnation=99)
    await thief.greet()
    async with both.open(new_id, WANTED) as lease:
        await claimed(peer, new_id)
        await thief.send(Claim(new_id), chunk(new_id, 0, (0, 20)), seal(new_id, 0), Failed(new_id, ""))
        assert "streaming" in (await thief.expect(Refused)).reason
        for _ in range(2):
            await thief.expect(Cancel)
        assert both.desk.table.counts == {LeaseState.STREAMING: 1}
        await peer.send(chunk(new_id, 0, (0, 20)), seal(new_id, 1))
        await peer.expect(Credit)
        await peer.expect(Committed)
        await lease.arrived()
    await thief.channel.close()


async def test_late_frames_are_dropped_and_answered_with_cancel(both: Rig, peer: RawPeer) -> None:
    new_id = lease_id()
    async with both.open(new_id, WANTED) as lease:
        await claimed(peer, new_id)
        await lease.cancel("the client left")
        await peer.expect(Cancel)
    await peer.send(chunk(new_id, 0, (0, 20)), seal(new_id, 1), Failed(new_id, ""))
    assert [await peer.receive() for _ in range(2)] == [Cancel(new_id, "the lease has ended")] * 2
    assert not both.sink.written


@pytest.mark.parametrize("frame", [Committed(bytes(16)), Accepted(bytes(16), (1,), 0, 1, 1.0), Nack(bytes(16), 0)])
async def test_a_frame_that_only_decode_sends_ends_the_session(both: Rig, peer: RawPeer, frame: Frame) -> None:
    new_id = lease_id()
    async with both.open(new_id, WANTED) as lease:
        await claimed(peer, new_id)
        await peer.send(frame)
        await peer.until_gone()
        with pytest.raises(HandoffError, match="which only decode may"):
            await lease.arrived()


async def test_nothing_is_looked_at_before_hello(both: Rig) -> None:
    new_id = lease_id()
    async with both.open(new_id, WANTED):
        peer = RawPeer(await both.connect("memory"))
        await peer.send(Claim(new_id))
        await peer.expect(Hello)
        await peer.until_gone()
        assert both.desk.table.counts == {LeaseState.RESERVED: 1}


async def test_a_peer_that_does_not_run_the_plan_of_a_lease_gets_no_prompt(both: Rig) -> None:
    """Two plans may meet at Hello by another plan than the one of the lease."""
    new_id = lease_id()
    async with both.open(new_id, WANTED):
        peer = RawPeer(await both.connect("memory"))
        both.server._identity = replace(both.server._identity, plan_hashes=(PLAN, "plan-b"))
        await peer.greet(plans=("plan-b",))
        await peer.send(Claim(new_id))
        assert "which you don't run" in (await peer.expect(Refused)).reason
        await peer.channel.close()


async def test_garbage_on_the_wire_ends_the_session_with_a_reason() -> None:
    async with rig("grpc") as both:
        peer = RawPeer(await both.connect(both.address))
        await peer.greet()
        new_id = lease_id()
        async with both.open(new_id, WANTED) as lease:
            await claimed(peer, new_id)
            await peer.send(replace(chunk(new_id, 0, (0, 10)), token_end=0))
            error = await peer.until_gone()
            assert isinstance(error, ProtocolViolation)
            with pytest.raises(ProtocolViolation, match="empty or out of bounds"):
                await lease.arrived()


@pytest.mark.parametrize("garbage", [b"", b"\xff" * 5], ids=["empty", "no message"])
async def test_bytes_that_are_no_frame_end_the_session_with_a_reason(garbage: bytes) -> None:
    async with rig("grpc") as both, grpc.aio.insecure_channel(both.address) as channel:
        call = channel.stream_stream("/shoal.v1.HandoffService/Session")()  # type: ignore[call-arg]
        await call.write(garbage)
        await asyncio.wait_for(call.read(), 10)  # its Hello
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await asyncio.wait_for(call.read(), 10)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await both.hand_off(prompt())  # and nobody else's


async def test_a_prefill_session_survives_frames_of_leases_that_it_left(both: Rig) -> None:
    session = await both.pool.get("memory")
    decode = next(iter(both.server._sessions))
    for frame in (
        Accepted(bytes(16), (1, 2), 0, 1024, 5.0),
        Credit(bytes(16), 0, 10),
        Nack(bytes(16), 0),
        Committed(bytes(16)),
        Cancel(bytes(16), ""),
        Refused(bytes(16), ""),
    ):
        decode.post(frame)
    await both.hand_off(prompt(seed=1))
    assert session.num_dropped == 6


async def test_a_prefill_session_ends_on_a_frame_that_only_prefill_sends(both: Rig) -> None:
    session = await both.pool.get("memory")
    next(iter(both.server._sessions)).post(Claim(bytes(16)))
    await settle()
    assert isinstance(session.error, ProtocolViolation)


async def test_who_asks_and_never_reads_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each claim of a lease that isn't there is answered; what isn't read of that must not fill decode's memory."""
    monkeypatch.setattr(session, "MAX_UNSENT_FRAMES", 50)
    theirs, ours = memory_pair()
    send, is_stuck = ours.send, asyncio.Event()

    async def send_hello_alone(envelope: Envelope) -> None:
        if isinstance(envelope.frame, Hello):
            await send(envelope)
        else:
            await is_stuck.wait()

    ours.send = send_hello_alone  # type: ignore[method-assign]
    async with rig() as both:
        decode = DecodeSession(ours, both.desk, Identity(1, (PLAN,)))
        serving = asyncio.ensure_future(decode.run())
        peer = RawPeer(theirs)
        await peer.greet()
        await peer.send(*(Claim(lease_id()) for _ in range(60)))
        with pytest.raises(ProtocolViolation, match="50 answers wait"):
            await asyncio.wait_for(serving, 20)
        assert decode.is_over and decode._outbox.qsize() <= 50
        beat = decode._timers["beat"]
        decode._beat()  # as the one that finds no more room
        assert decode._timers["beat"] is beat, "nobody would ever end another one"
