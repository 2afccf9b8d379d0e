"""Prefill's session against a decode replica that says whatever a test wants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace

import pytest
from fake_clock import FakeClock, settle
from kv_prompts import PLAN
from raw_peer import RawPeer

from shoal.errors import Cancelled, LeaseLost, PeerGone, PlanMismatch, ShoalError
from shoal.handoff.base import prompt_hash
from shoal.handoff.channels.memory import memory_pair
from shoal.handoff.prefill_side import PrefillSession, PromptClaim
from shoal.handoff.session import PROTOCOL_VERSION, Identity
from shoal.wire.handoff_messages import (
    Accepted,
    Cancel,
    Chunk,
    Claim,
    Committed,
    Credit,
    Draining,
    Failed,
    Hello,
    Nack,
    Refused,
    Seal,
    WireMode,
)

ID = bytes(16)
TOKEN_IDS = tuple(range(9))
FRAME_BYTES = 100
ACCEPTED = Accepted(ID, TOKEN_IDS, 0, 2 * FRAME_BYTES, 5.0)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def decode() -> RawPeer:
    return RawPeer(memory_pair()[1])


@pytest.fixture
async def session(decode: RawPeer, clock: FakeClock) -> AsyncIterator[PrefillSession]:
    channel = decode.channel._other  # type: ignore[attr-defined]
    await decode.send(Hello(PROTOCOL_VERSION, (PLAN,)))
    identity = Identity(5, (PLAN,), peer="prefill")
    opened = await PrefillSession.open(channel, identity, ttl_s=5.0, max_frame_bytes=FRAME_BYTES, clock=clock)
    assert await decode.receive() == identity.hello
    yield opened
    await opened.close()


class Work:
    """A claim that is held by a task, which does what it's told until it leaves."""

    def __init__(self, session: PrefillSession) -> None:
        self.claim: PromptClaim | None = None
        self._leave = asyncio.Event()
        self._task = asyncio.ensure_future(self._run(session))

    async def _run(self, session: PrefillSession) -> None:
        async with session.claim(ID) as self.claim:
            await self._leave.wait()

    async def held(self) -> PromptClaim:
        await settle()
        assert self.claim is not None
        return self.claim

    async def leave(self) -> None:
        self._leave.set()
        await self._task


async def accepted(session: PrefillSession, decode: RawPeer) -> tuple[Work, PromptClaim]:
    work = Work(session)
    await decode.expect(Claim)
    await decode.send(ACCEPTED)
    return work, await work.held()


def ship(claim: PromptClaim, num_frames: int) -> asyncio.Future[None]:
    payload = memoryview(bytes(num_frames * FRAME_BYTES))
    return asyncio.ensure_future(claim.send(0, 1, 0, num_frames, payload))


async def outcome(work: Coroutine[object, object, None] | asyncio.Future[None]) -> ShoalError | None:
    try:
        await work
    except ShoalError as error:
        return error
    return None


async def test_the_prompt_comes_with_the_acceptance(session: PrefillSession, decode: RawPeer) -> None:
    work, claim = await accepted(session, decode)
    assert (claim.token_ids, claim.num_present) == (TOKEN_IDS, 0)
    await work.leave()
    assert (await decode.expect(Failed)).reason == "prefill left the lease unsealed"
    assert session.num_claims == 0


async def test_a_refusal_says_why_and_needs_no_answer(session: PrefillSession, decode: RawPeer) -> None:
    work = Work(session)
    await decode.expect(Claim)
    await decode.send(Refused(ID, "taken"))
    assert isinstance(error := await outcome(work.leave()), LeaseLost)
    assert error.message == "taken"
    session.post(Draining())
    await decode.expect(Draining)  # and nothing before it


async def test_no_byte_goes_beyond_the_credit(session: PrefillSession, decode: RawPeer) -> None:
    work, claim = await accepted(session, decode)
    sending = ship(claim, 4)
    await settle()
    assert [(await decode.expect(Chunk)).seq for _ in range(2)] == [0, 1]
    # None of these is worth a byte: said twice, about a chunk that nobody sent, or with another number.
    await decode.send(ACCEPTED, Credit(ID, 9, FRAME_BYTES), Credit(ID, 0, 10 * FRAME_BYTES), Credit(ID, 0, FRAME_BYTES))
    assert (await decode.expect(Chunk)).seq == 2
    await settle()
    assert not sending.done()
    await decode.send(Credit(ID, 2, FRAME_BYTES))
    assert (await decode.expect(Chunk)).seq == 3
    await sending
    await work.leave()


async def test_a_chunk_is_sent_again_once(session: PrefillSession, decode: RawPeer) -> None:
    work, claim = await accepted(session, decode)
    await ship(claim, 2)
    first, second = await decode.expect(Chunk), await decode.expect(Chunk)
    await decode.send(Nack(ID, 1), Nack(ID, 1), Credit(ID, 0, FRAME_BYTES), Nack(ID, 0), Nack(ID, 7))
    assert await decode.expect(Chunk) == second
    assert first.seq == 0
    await settle()
    await work.leave()
    await decode.expect(Failed)  # and no chunk before it


async def test_the_seal_names_what_was_computed(session: PrefillSession, decode: RawPeer) -> None:
    work, claim = await accepted(session, decode)
    await ship(claim, 2)
    sealing = asyncio.ensure_future(claim.seal(boundary_token_id=8, queue_s=1.5, prefill_s=2.5))
    for _ in range(2):
        await decode.expect(Chunk)
    assert await decode.expect(Seal) == Seal(ID, 2, prompt_hash(TOKEN_IDS), 8, 1.5, 2.5)
    await decode.send(Refused(ID, "said of a claim that came twice"), Committed(ID), Cancel(ID, "late"))
    await sealing
    assert not claim.cancelled.is_set()
    await work.leave()
    session.post(Draining())
    await decode.expect(Draining)


async def test_cancel_needs_no_answer(session: PrefillSession, decode: RawPeer) -> None:
    work, claim = await accepted(session, decode)
    await decode.send(Cancel(ID, "the client left"))
    await settle()
    assert claim.cancelled.is_set()
    error = await outcome(claim.send(0, 1, 0, 1, memoryview(bytes(8))))
    assert isinstance(error, Cancelled)
    await work.leave()
    session.post(Draining())
    await decode.expect(Draining)


async def test_cancel_of_a_claim_that_was_left_is_dropped(session: PrefillSession, decode: RawPeer) -> None:
    await decode.send(Cancel(ID, "who are you"))
    await settle()
    assert session.num_dropped == 1
    session.post(Draining())
    await decode.expect(Draining)


async def test_an_acceptance_that_comes_too_late_is_given_back(
    session: PrefillSession, decode: RawPeer, clock: FakeClock
) -> None:
    work = Work(session)
    await decode.expect(Claim)
    for _ in range(6):
        await clock.advance(1.0)
        await decode.send(Draining())  # a sign of life, but no answer
    assert isinstance(error := await outcome(work.leave()), LeaseLost)
    assert "no answer to a claim" in error.message
    await decode.expect(Failed)
    await decode.send(ACCEPTED)
    assert "before it was accepted" in (await decode.expect(Failed)).reason


async def test_no_claim_is_made_on_a_session_that_is_over(session: PrefillSession, decode: RawPeer) -> None:
    await decode.channel.close()
    await settle()
    assert session.is_over
    assert isinstance(await outcome(Work(session).leave()), PeerGone)


async def test_wire_modes_must_meet(decode: RawPeer) -> None:
    await decode.send(Hello(PROTOCOL_VERSION, (PLAN,), (WireMode.HIDDEN,)))
    channel = decode.channel._other  # type: ignore[attr-defined]
    identity = Identity(5, (PLAN,))
    with pytest.raises(PlanMismatch, match="wire mode"):
        await PrefillSession.open(channel, identity, ttl_s=5.0, max_frame_bytes=FRAME_BYTES, clock=FakeClock())
    both = replace(identity, wire_modes=(WireMode.HIDDEN, WireMode.KV))
    prefill, other = memory_pair()
    peer = RawPeer(other)
    await peer.send(Hello(PROTOCOL_VERSION, (PLAN,), (WireMode.HIDDEN,)))
    opened = await PrefillSession.open(prefill, both, ttl_s=5.0, max_frame_bytes=FRAME_BYTES, clock=FakeClock())
    await opened.close()
