"""Beats and expiry, by a clock that only the test moves."""

from __future__ import annotations

import asyncio

import pytest
from fake_clock import FakeClock, settle
from kv_prompts import PLAN, lease_id, prompt
from raw_peer import RawPeer
from transfer_helpers import TIMES, rig

from shoal.errors import HandoffError, LeaseLost, PeerGone
from shoal.handoff.channels.faults import Drop
from shoal.handoff.channels.memory import memory_pair
from shoal.handoff.lease import LeaseState
from shoal.handoff.prefill_side import PrefillSession
from shoal.handoff.session import PROTOCOL_VERSION, Identity
from shoal.wire.handoff_messages import Accepted, Beat, Cancel, Claim, Envelope, Failed, Grant, Granted, Hello
from shoal.wire.messages import RequestContext


async def test_an_unclaimed_lease_expires_after_the_claim_timeout() -> None:
    clock = FakeClock()
    async with rig(clock=clock) as both, both.open(lease_id(), prompt()) as lease:
        await clock.advance(TIMES.claim_timeout_s - 0.1)
        assert both.desk.table.counts == {LeaseState.RESERVED: 1}
        await clock.advance(0.1)
        with pytest.raises(LeaseLost, match="nobody claimed"):
            await lease.arrived()
        assert both.counts.events["expired"] == 1


async def test_beats_keep_an_idle_lease_alive() -> None:
    clock = FakeClock()
    async with rig(clock=clock) as both:
        new_id = lease_id()
        session = await both.pool.get("memory")
        async with both.open(new_id, prompt()), session.claim(new_id):
            await clock.advance(100 * TIMES.ttl_s)
            assert both.desk.table.counts == {LeaseState.STREAMING: 1}
    assert both.counts.events["expired"] == 0


async def test_a_lease_that_prefill_has_given_up_expires_also_if_failed_was_lost() -> None:
    """Beats of the session go on: they renew what prefill works on, and nothing else."""
    clock = FakeClock()
    lost = Drop(lambda frame: isinstance(frame, Failed), times=1)
    async with rig(clock=clock, prefill_sends=lost) as both:
        given_up, worked_on = lease_id(), lease_id()
        session = await both.pool.get("memory")
        async with both.open(given_up, prompt()) as lease, both.open(worked_on, prompt()), session.claim(worked_on):
            with pytest.raises(HandoffError, match="out of blocks"):
                async with session.claim(given_up):
                    raise HandoffError("out of blocks")
            await clock.advance(2 * TIMES.ttl_s)
            with pytest.raises(LeaseLost, match="nobody renewed"):
                await lease.arrived()
            assert both.desk.table.counts == {LeaseState.STREAMING: 1}
    assert both.counts.events["expired"] == 1


async def test_without_beats_a_lease_expires_and_prefill_is_told() -> None:
    clock = FakeClock()
    async with rig(clock=clock) as both:
        new_id = lease_id()
        peer = RawPeer(await both.connect("memory"))
        await peer.greet()
        async with both.open(new_id, prompt()) as lease:
            await peer.send(Claim(new_id))
            await peer.expect(Accepted)
            await clock.advance(TIMES.ttl_s * 0.9)
            await peer.send(Failed(bytes(16), ""))  # a sign of life, but no beat
            await clock.advance(TIMES.ttl_s * 0.1)
            assert "nobody renewed" in (await peer.expect(Cancel)).reason
            with pytest.raises(LeaseLost, match="nobody renewed"):
                await lease.arrived()
        await peer.channel.close()
    assert both.counts.events["expired"] == 1


async def test_a_silent_peer_ends_the_session_after_ttl_and_not_before() -> None:
    clock = FakeClock()
    async with rig(clock=clock) as both:
        peer = RawPeer(await both.connect("memory"))
        await peer.greet()
        await clock.advance(3.0)
        await peer.send(Beat())
        await clock.advance(TIMES.ttl_s - 0.01)
        assert both.server.num_sessions == 1
        await clock.advance(0.01)
        assert both.server.num_sessions == 0


async def test_a_decode_that_never_greets_is_gone_after_ttl() -> None:
    clock = FakeClock()
    async with rig(clock=clock, decode_sends=Drop(lambda frame: True, times=1000)) as both:
        opening = asyncio.ensure_future(both.pool.get("memory"))
        await settle()
        await clock.advance(TIMES.ttl_s)
        with pytest.raises(PeerGone, match="nothing was heard"):
            await opening


async def test_a_greeting_that_is_written_too_late_leaves_nothing() -> None:
    """As of a process that was stopped in its midst."""
    clock, is_written = FakeClock(), asyncio.Event()
    async with rig(clock=clock) as both:
        channel, other = memory_pair()
        send = other.send

        async def send_late(envelope: Envelope) -> None:
            await send(envelope)
            await is_written.wait()

        other.send = send_late  # type: ignore[method-assign]
        serving = asyncio.ensure_future(both.server.serve(other))
        peer = RawPeer(channel)
        await peer.greet()
        await clock.advance(TIMES.ttl_s)
        is_written.set()
        with pytest.raises(PeerGone, match="nothing was heard"):
            await serving
        assert not both.desk._posters
        await clock.advance(TIMES.ttl_s)
        assert not [timer for _, _, timer in clock._due if timer.callback is not None]


async def test_a_copy_is_waited_for_however_long_it_takes() -> None:
    clock = FakeClock()
    async with rig(clock=clock) as both:
        new_id, wanted = lease_id(), prompt(11)
        both.sink.gate.clear()
        async with both.open(new_id, wanted) as lease:
            call = asyncio.ensure_future(both.prefill(new_id, wanted))
            await both.sink.started.wait()
            await clock.advance(60)  # prefill gave up meanwhile
            with pytest.raises(LeaseLost, match="no commit from decode"):
                await call
            with pytest.raises(HandoffError):
                await lease.arrived()
            assert both.desk.table.counts == {LeaseState.CANCELLING: 1}
            both.sink.gate.set()


@pytest.mark.parametrize("times", [0.1, 10.0])
async def test_pools_of_different_ttls_keep_decodes(times: float) -> None:
    clock = FakeClock()
    async with rig(clock=clock) as both:
        both.pool._ttl_s = times * TIMES.ttl_s
        new_id = lease_id()
        session = await both.pool.get("memory")
        async with both.open(new_id, prompt()), session.claim(new_id):
            await clock.advance(100 * TIMES.ttl_s)
            assert both.desk.table.counts == {LeaseState.STREAMING: 1}
    assert both.counts.events["expired"] == 0


async def test_prefill_watches_for_as_long_as_decode_asks_for_if_that_is_shorter() -> None:
    clock = FakeClock()
    prefill, decode = memory_pair()
    identity = Identity(5, (PLAN,), peer="prefill")
    opening = asyncio.create_task(
        PrefillSession.open(prefill, identity, ttl_s=10 * TIMES.ttl_s, max_frame_bytes=1024, clock=clock)
    )
    await decode.send(Envelope(7, Hello(PROTOCOL_VERSION, (PLAN,))))
    session = await opening
    grant = Grant(lease_id(), "memory", PLAN, 20, 0, TIMES.ttl_s, 30.0, RequestContext("asks", 30.0))
    await decode.send(Envelope(7, Granted.of(grant)))
    await settle()
    await clock.advance(TIMES.ttl_s - 0.01)
    assert session.error is None
    await clock.advance(0.01)
    assert isinstance(session.error, PeerGone)
    await session.close()
