"""What a hand-off promises, over every channel and carrier."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

import pytest
from kv_prompts import NUM_SHALLOW, STATE_BYTES, TOKEN_BYTES, lease_id, prompt
from raw_peer import RawPeer
from transfer_helpers import needs_nixl, rig, send_all

from shoal.errors import Cancelled, HandoffError, LeaseLost, PeerGone, PlanMismatch, ShoalError, Unavailable
from shoal.handoff.lease import LeaseState
from shoal.handoff.session import PROTOCOL_VERSION
from shoal.handoff.terms import PartBytes
from shoal.wire.handoff_messages import Accepted, Claim, Refused

pytestmark = pytest.mark.parametrize(
    "kind",
    [
        "memory",
        "grpc",
        "tls",
        "grpc+shm",
        "memory+far",
        pytest.param("grpc+nixl", marks=needs_nixl),
        "memory+hidden",
        "grpc+shm+hidden",
    ],
)


async def test_a_prompt_arrives_byte_for_byte(kind: str) -> None:
    wanted = prompt()
    async with rig(kind) as both:
        arrived = await both.hand_off(wanted)
        both.assert_arrived(wanted)
    assert (arrived.queue_s, arrived.prefill_s) == (0.25, 0.5)
    is_hidden = kind.endswith("hidden")
    assert arrived.num_bytes == PartBytes(
        40 * NUM_SHALLOW * TOKEN_BYTES, 0 if is_hidden else 40 * TOKEN_BYTES, 40 * STATE_BYTES if is_hidden else 0
    )
    assert both.counts.bytes == asdict(arrived.num_bytes)
    assert both.counts.events == {"started": 1, "committed": 1, "ended": 1}


@pytest.mark.parametrize("num_present", [1, 17, 39])
async def test_only_what_decode_lacks_is_shipped(kind: str, num_present: int) -> None:
    wanted = prompt(num_present=num_present)
    async with rig(kind) as both:
        arrived = await both.hand_off(wanted)
        both.assert_arrived(wanted)
    assert arrived.num_bytes.shallow == wanted.num_shipped * NUM_SHALLOW * TOKEN_BYTES


@pytest.mark.parametrize(("num_tokens", "num_present"), [(1, 0), (2, 1), (41, 40)])
async def test_a_lease_with_nothing_to_ship_is_committed_without_a_chunk(
    kind: str, num_tokens: int, num_present: int
) -> None:
    async with rig(kind) as both:
        arrived = await both.hand_off(prompt(num_tokens, num_present=num_present))
    assert arrived.num_chunks == 0


async def test_many_leases_share_one_session_and_none_mixes_with_another(kind: str) -> None:
    prompts = [prompt(20 + 13 * number, seed=number) for number in range(8)]
    async with rig(kind) as both:
        await asyncio.gather(*(both.hand_off(wanted) for wanted in prompts))
        for wanted in prompts:
            both.assert_arrived(wanted)
        assert len(both.channels) == 1
    assert both.counts.events["committed"] == len(prompts)


async def test_prefill_waits_for_credit_and_goes_on_when_it_comes(kind: str) -> None:
    wanted = prompt(200)
    async with rig(kind) as both:
        both.sink.gate.clear()
        task = asyncio.ensure_future(both.hand_off(wanted))
        await both.sink.started.wait()
        await asyncio.sleep(0.2)  # a while in which it must not go on
        written = sum(both.sink.writing.values())
        assert 0 < written * 1024 <= 2 * 4096  # frames are 320 or 960 bytes, the credit is 4096
        both.sink.gate.set()
        await task
        both.assert_arrived(wanted)
    assert both.sink.max_writing == written


async def test_a_lease_belongs_to_its_first_claimant(kind: str) -> None:
    async with rig(kind) as both:
        new_id, wanted = lease_id(), prompt()
        async with both.open(new_id, wanted):
            session = await both.pool.get(both.address)
            other = RawPeer(await both.connect(both.address))
            await other.greet()
            async with session.claim(new_id):
                with pytest.raises(LeaseLost, match="claimed here already"):
                    async with session.claim(new_id):
                        pass
                await other.send(Claim(new_id))
                refused = await other.expect(Refused)
                assert "streaming" in refused.reason
        await other.channel.close()


async def test_an_unknown_or_ended_lease_cannot_be_claimed(kind: str) -> None:
    async with rig(kind) as both:
        new_id, wanted = lease_id(), prompt()
        with pytest.raises(LeaseLost, match="unknown"):
            await both.prefill(new_id, wanted)
        async with both.open(new_id, wanted):
            await both.prefill(new_id, wanted)
        with pytest.raises(LeaseLost, match="has ended"):
            await both.prefill(new_id, wanted)


async def test_a_claim_without_a_seal_fails_the_lease(kind: str) -> None:
    async with rig(kind) as both:
        new_id, wanted = lease_id(), prompt()
        async with both.open(new_id, wanted) as lease:
            session = await both.pool.get(both.address)
            async with session.claim(new_id) as claim:
                await send_all(claim, wanted, until=20)
            with pytest.raises(HandoffError, match="left the lease unsealed"):
                await lease.arrived()


async def test_what_went_wrong_in_prefill_is_told_to_decode(kind: str) -> None:
    async with rig(kind) as both:
        new_id, wanted = lease_id(), prompt()
        async with both.open(new_id, wanted) as lease:
            session = await both.pool.get(both.address)
            with pytest.raises(Unavailable):
                async with session.claim(new_id):
                    raise Unavailable("out of prefill blocks")
            with pytest.raises(HandoffError, match="out of prefill blocks"):
                await lease.arrived()


# --- cancelled at each stage ----------------------------------------------------------------------------


async def test_cancel_before_the_claim_refuses_the_claim(kind: str) -> None:
    async with rig(kind) as both:
        new_id, wanted = lease_id(), prompt()
        async with both.open(new_id, wanted) as lease:
            await lease.cancel("the client left")
            with pytest.raises(Cancelled, match="the client left"):
                await lease.arrived()
            with pytest.raises(LeaseLost):
                await both.prefill(new_id, wanted)


async def test_cancel_while_streaming_stops_prefill(kind: str) -> None:
    async with rig(kind) as both:
        new_id, wanted = lease_id(), prompt()
        session = await both.pool.get(both.address)
        async with both.open(new_id, wanted) as lease, session.claim(new_id) as claim:
            await send_all(claim, wanted, until=20)
            await lease.cancel("the client left")
            await asyncio.wait_for(claim.cancelled.wait(), 5)
            with pytest.raises(Cancelled, match="the client left"):
                await claim.send(20, 21, 0, 4, memoryview(bytes(4 * TOKEN_BYTES)))


async def test_leaving_while_a_copy_runs_waits_for_it(kind: str) -> None:
    async with rig(kind) as both:
        new_id, wanted = lease_id(), prompt()
        both.sink.gate.clear()

        async def leave() -> None:
            async with both.open(new_id, wanted) as lease:
                await lease.arrived()

        decode = asyncio.ensure_future(leave())
        prefill = asyncio.ensure_future(_outcome(both.prefill(new_id, wanted)))
        await both.sink.started.wait()
        decode.cancel()
        assert isinstance(await asyncio.wait_for(prefill, 5), Cancelled)  # told at once, while the copy goes on
        decode.cancel()  # impatience changes nothing: the copy thread may still be writing
        await asyncio.sleep(0)
        assert not decode.done()
        assert both.desk.table.counts == {LeaseState.CANCELLING: 1}
        both.sink.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await decode
        assert not +both.sink.writing


async def test_cancel_after_the_seal_but_before_the_commit_publishes_nothing(kind: str) -> None:
    async with rig(kind) as both:
        new_id, wanted = lease_id(), prompt(11)
        both.sink.gate.clear()
        async with both.open(new_id, wanted) as lease:
            prefill = asyncio.ensure_future(_outcome(both.prefill(new_id, wanted)))
            await both.counts.reached(LeaseState.SEALED)
            asyncio.get_running_loop().call_soon(both.sink.gate.set)
            await lease.cancel("the client left")
            with pytest.raises(Cancelled):
                await lease.arrived()
        assert isinstance(await prefill, Cancelled)
    assert both.counts.events["committed"] == 0


# --- somebody dies --------------------------------------------------------------------------------------


async def test_when_prefill_dies_its_leases_fail_and_the_others_live(kind: str) -> None:
    async with rig(kind) as both:
        lost, kept = lease_id(), prompt(seed=1)
        other = RawPeer(await both.connect(both.address))
        await other.greet()
        async with both.open(lost, prompt()) as lease:
            await other.send(Claim(lost))
            await other.expect(Accepted)
            await other.channel.close()
            with pytest.raises(PeerGone):
                await asyncio.wait_for(lease.arrived(), 5)
            await both.hand_off(kept)
        both.assert_arrived(kept)
    assert both.counts.events["failed:peer_gone"] == 1


async def test_when_decode_dies_prefill_holds_nothing_and_finds_the_next_one(kind: str) -> None:
    async with rig(kind) as both:
        new_id, wanted = lease_id(), prompt()
        session = await both.pool.get(both.address)
        async with both.open(new_id, wanted) as lease:
            async with session.claim(new_id) as claim:
                await both.channels[0].close()
                await asyncio.wait_for(claim.cancelled.wait(), 5)
                with pytest.raises(PeerGone):
                    await claim.seal(boundary_token_id=0, queue_s=0, prefill_s=0)
            with pytest.raises(PeerGone):
                await lease.arrived()
        assert session.is_over
        await both.hand_off(wanted)  # a new session, opened by itself
        assert len(both.channels) == 2


async def test_a_copy_that_fails_fails_its_lease_alone(kind: str) -> None:
    async with rig(kind) as both:
        both.sink.fails = Unavailable("the pool is gone")
        with pytest.raises(Unavailable, match="the pool is gone"):
            await both.hand_off(prompt(seed=1))
        both.sink.fails = None
        await both.hand_off(prompt(seed=2))
        both.assert_arrived(prompt(seed=2))


# --- greeting -------------------------------------------------------------------------------------------


async def test_another_plan_is_refused_on_both_sides_and_named(kind: str) -> None:
    async with rig(kind, prefill_plans=("plan-b",)) as both:
        with pytest.raises(PlanMismatch, match=r"plan-b here, plan-a at decode"):
            await both.pool.get(both.address)


async def test_another_version_is_refused_before_plans_are_looked_at(kind: str) -> None:
    async with rig(kind) as both:
        peer = RawPeer(await both.connect(both.address))
        await peer.greet(version=99, plans=("plan-b",))
        error = await peer.until_gone()
    if not kind.startswith("memory"):  # memory has no status that could say so
        assert isinstance(error, PlanMismatch)
        assert f"hand-off protocol {PROTOCOL_VERSION} here, 99 at raw" in error.message


# --- shutting down --------------------------------------------------------------------------------------


async def test_decode_drains_open_leases_and_opens_no_more(kind: str) -> None:
    async with rig(kind) as both:
        both.sink.gate.clear()
        task = asyncio.ensure_future(both.hand_off(prompt()))
        await both.sink.started.wait()
        drain = asyncio.ensure_future(both.server.drain(5))
        await asyncio.sleep(0)  # its first step refuses what is new
        with pytest.raises(Unavailable, match="shutting down"):
            await both.hand_off(prompt(seed=1))
        both.sink.gate.set()
        await task
        await drain
        both.assert_arrived(prompt())


async def test_decode_cancels_what_does_not_finish_within_the_drain(kind: str) -> None:
    async with rig(kind) as both:
        new_id = lease_id()
        session = await both.pool.get(both.address)
        async with both.open(new_id, prompt()) as lease:
            async with session.claim(new_id) as claim:
                await both.server.drain(0.05)
                with pytest.raises(ShoalError):
                    await claim.seal(boundary_token_id=0, queue_s=0, prefill_s=0)
            with pytest.raises(Unavailable, match="has shut down"):
                await lease.arrived()


async def test_closing_waits_for_the_copy_under_way(kind: str) -> None:
    async with rig(kind) as both:
        both.sink.gate.clear()
        task = asyncio.ensure_future(both.hand_off(prompt()))
        await both.sink.started.wait()
        close = asyncio.ensure_future(both.server.close())
        await asyncio.sleep(0.05)  # a while in which it must not end
        assert not close.done()  # whoever closes frees the pool next
        both.sink.gate.set()
        await close
        assert not +both.sink.writing
        with pytest.raises((HandoffError, Cancelled, Unavailable)):
            await task


async def test_prefill_drains_open_claims_and_takes_no_more(kind: str) -> None:
    async with rig(kind) as both:
        both.sink.gate.clear()
        task = asyncio.ensure_future(both.hand_off(prompt()))
        await both.sink.started.wait()
        drain = asyncio.ensure_future(both.pool.drain(5))
        await asyncio.sleep(0)  # its first step refuses what is new
        with pytest.raises(Unavailable, match="shutting down"):
            await both.pool.get(both.address)
        both.sink.gate.set()
        await task
        await drain
    assert both.counts.events["committed"] == 1


async def test_prefill_stops_what_does_not_finish_within_the_drain(kind: str) -> None:
    async with rig(kind) as both:
        new_id = lease_id()
        session = await both.pool.get(both.address)

        async def work() -> None:
            async with session.claim(new_id) as claim:
                await claim.cancelled.wait()
                await claim.seal(boundary_token_id=0, queue_s=0, prefill_s=0)

        async with both.open(new_id, prompt()) as lease:
            working = asyncio.ensure_future(_outcome(work()))
            await both.counts.reached(LeaseState.STREAMING)
            await both.pool.drain(0.05)
            assert isinstance(await working, Cancelled)
            with pytest.raises((HandoffError, PeerGone)):
                await lease.arrived()


async def _outcome(work: object) -> BaseException | None:
    try:
        await work  # type: ignore[misc]
    except ShoalError as error:
        return error
    return None
