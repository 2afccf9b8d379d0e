"""Every single fault, on every kind of frame, and storms of them. Time is the tests' own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
from fake_clock import FakeClock, settle
from kv_prompts import prompt
from more_faults import Reset, Storm
from transfer_helpers import TIMES, Rig, rig

from shoal.errors import ChecksumMismatch, HandoffError, LeaseLost, PeerGone, ProtocolViolation, ShoalError
from shoal.handoff.channels.faults import Corrupt, Delay, Drop, Duplicate, Fault
from shoal.handoff.channels.memory import Rule, deliver
from shoal.wire.handoff_messages import (
    Accepted,
    Beat,
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

FROM_PREFILL = (Hello, Claim, Chunk, Seal, Beat)
FROM_DECODE = (Hello, Accepted, Credit, Committed, Beat)
BOTH = [("prefill", kind) for kind in FROM_PREFILL] + [("decode", kind) for kind in FROM_DECODE]
each_frame = pytest.mark.parametrize(("side", "kind"), BOTH, ids=lambda value: getattr(value, "__name__", value))


@pytest.fixture(autouse=True, params=["memory", "memory+shm", "memory+far"])
def each_carrier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that follows is to hold for each."""
    monkeypatch.setitem(globals(), "rig", partial(rig, request.param))


END_S = TIMES.ttl_s


async def outcome(both: Rig, clock: FakeClock, *, within_s: float = END_S) -> ShoalError | None:
    """What one hand-off came to, on both sides, ``within_s`` of the clock at most."""
    task = asyncio.ensure_future(both.hand_off(prompt(101)))
    waited_s = 0.0
    await settle()
    while not task.done() and waited_s < within_s:
        await clock.advance(0.25)
        waited_s += 0.25
    assert task.done(), f"still under way after {within_s} s"
    both.assert_nothing_held()
    try:
        await task
    except ShoalError as error:
        return error
    both.assert_arrived(prompt(101))
    return None


def rules(side: str, fault: Fault) -> dict[str, Rule]:
    return {
        "prefill_sends": fault if side == "prefill" else deliver,
        "decode_sends": fault if side == "decode" else deliver,
    }


# --- what is repaired -----------------------------------------------------------------------------------


@each_frame
async def test_a_frame_that_comes_twice_changes_nothing(side: str, kind: type[Frame]) -> None:
    clock, fault = FakeClock(), Duplicate(kind)
    async with rig(clock=clock, **rules(side, fault)) as both:
        assert await outcome(both, clock) is None
    assert fault.num_left == 0 or kind is Beat
    assert both.counts.bytes["shallow"] == 100 * 3 * 32


@pytest.mark.parametrize("num_frames", [1, 2, 3])
@pytest.mark.parametrize("number", [0, 5, 19])
async def test_chunks_may_overtake_one_another(number: int, num_frames: int) -> None:
    clock = FakeClock()
    fault = Delay(lambda frame: isinstance(frame, Chunk) and frame.seq == number, num_frames=num_frames)
    async with rig(clock=clock, prefill_sends=fault) as both:
        assert await outcome(both, clock) is None
    assert fault.num_left == 0


@each_frame
async def test_a_late_frame_only_delays(side: str, kind: type[Frame]) -> None:
    clock, fault = FakeClock(), Delay(kind)
    async with rig(clock=clock, **rules(side, fault)) as both:
        error = await outcome(both, clock)
    # Hello is the one frame that must come first: nothing before it is looked at.
    assert error is None if kind is not Hello else isinstance(error, PeerGone | ProtocolViolation)


@pytest.mark.parametrize("number", [0, 7, 19])
@pytest.mark.parametrize("fault_type", [Drop, Corrupt])
async def test_a_lost_or_corrupt_chunk_is_sent_again(fault_type: type[Fault], number: int) -> None:
    clock = FakeClock()
    fault = fault_type(lambda frame: isinstance(frame, Chunk) and frame.seq == number)
    async with rig(clock=clock, prefill_sends=fault) as both:
        assert await outcome(both, clock) is None
    assert fault.num_left == 0
    assert both.counts.events["verify:checksum"] == (1 if fault_type is Corrupt else 0)


async def test_a_lost_credit_costs_a_part_of_the_window_only() -> None:
    clock, fault = FakeClock(), Drop(Credit)
    async with rig(clock=clock, decode_sends=fault) as both:
        assert await outcome(both, clock) is None
    assert fault.num_left == 0


async def test_a_lost_beat_is_made_up_for_by_the_next() -> None:
    clock, fault = FakeClock(), Drop(Beat)
    async with rig(clock=clock, prefill_sends=fault) as both:
        session = await both.pool.get(both.address)
        await clock.advance(20 * TIMES.ttl_s)
        assert not session.is_over
        assert fault.num_left == 0


# --- what is not, and ends in time ----------------------------------------------------------------------


async def test_a_chunk_that_stays_corrupt_fails_the_lease() -> None:
    clock = FakeClock()
    fault = Corrupt(lambda frame: isinstance(frame, Chunk) and frame.seq == 3, times=2)
    async with rig(clock=clock, prefill_sends=fault) as both:
        assert isinstance(await outcome(both, clock), ChecksumMismatch)
        assert await outcome(both, clock) is None  # the session goes on
    assert both.counts.events["verify:checksum"] == 2
    assert both.counts.events["failed:checksum_mismatch"] == 1


async def test_a_chunk_that_is_lost_twice_fails_the_lease() -> None:
    clock = FakeClock()
    fault = Drop(lambda frame: isinstance(frame, Chunk) and frame.seq == 3, times=2)
    async with rig(clock=clock, prefill_sends=fault) as both:
        assert isinstance(await outcome(both, clock), HandoffError)
    assert fault.num_left == 0


@pytest.mark.parametrize(
    ("side", "kind"), [("prefill", Claim), ("decode", Accepted), ("prefill", Seal), ("decode", Committed)]
)
async def test_a_lost_frame_that_nothing_repairs_ends_both_sides(side: str, kind: type[Frame]) -> None:
    clock, fault = FakeClock(), Drop(kind)
    async with rig(clock=clock, **rules(side, fault)) as both:
        error = await outcome(both, clock)
        # Decode is the one who knows: what it committed is good, whether or not prefill heard of it.
        assert error is None if kind is Committed else isinstance(error, LeaseLost)
        assert await outcome(both, clock) is None
    assert fault.num_left == 0


async def test_a_lost_nack_ends_both_sides() -> None:
    clock, fault, lost = FakeClock(), Drop(Nack), Drop(Chunk)
    async with rig(clock=clock, prefill_sends=lost, decode_sends=fault) as both:
        assert isinstance(await outcome(both, clock), HandoffError)
    assert fault.num_left == lost.num_left == 0


async def test_when_every_credit_is_lost_prefill_gives_up() -> None:
    clock, fault = FakeClock(), Drop(Credit, times=1000)
    async with rig(clock=clock, decode_sends=fault, credit_bytes=1024) as both:
        error = await outcome(both, clock)
    assert isinstance(error, LeaseLost)
    assert "no credit" in error.message


@each_frame
async def test_a_channel_that_breaks_at_any_frame_ends_both_sides(side: str, kind: type[Frame]) -> None:
    clock, fault = FakeClock(), Reset(kind)
    async with rig(clock=clock, **rules(side, fault)) as both:
        error = await outcome(both, clock)
        # What is reset before the last frame fails; Committed is the last, and decode knew already.
        assert (error is None) if kind is Committed else isinstance(error, PeerGone)
        assert await outcome(both, clock) is None  # over a new channel
    assert fault.num_left == 0
    assert len(both.channels) == 2


@pytest.mark.parametrize("number", range(0, 24, 3))
async def test_a_channel_that_breaks_at_the_nth_frame_ends_both_sides(number: int) -> None:
    clock, seen = FakeClock(), []
    fault = Reset(lambda frame: seen.append(frame) or len(seen) > number)  # type: ignore[func-returns-value]
    async with rig(clock=clock, prefill_sends=fault) as both:
        assert isinstance(await outcome(both, clock), PeerGone)


@pytest.mark.parametrize("after", [Hello, Accepted, Credit])
async def test_a_partition_ends_both_sides_within_ttl(after: type[Frame]) -> None:
    cut = Partition(after)
    clock = FakeClock()
    async with rig(clock=clock, prefill_sends=cut.silence, decode_sends=cut) as both:
        assert isinstance(await outcome(both, clock), PeerGone)
        assert both.server.num_sessions == 0


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_partition_of_one_direction_ends_both_sides(side: str) -> None:
    clock, fault = FakeClock(), Drop(lambda frame: not isinstance(frame, Hello), times=1000)
    async with rig(clock=clock, **rules(side, fault)) as both:
        assert isinstance(await outcome(both, clock), HandoffError | PeerGone)


async def test_a_lost_failed_is_made_up_for_by_the_call_that_returns() -> None:
    clock, fault = FakeClock(), Drop(Failed)
    async with rig(clock=clock, prefill_sends=fault) as both:

        def give_up(claim: object) -> None:
            raise LeaseLost("prefill changed its mind")

        with pytest.raises(LeaseLost, match="changed its mind"):
            await both.hand_off(prompt(), before_seal=give_up)
        both.assert_nothing_held()
    assert fault.num_left == 0


@pytest.mark.parametrize("seed", range(16))
async def test_in_a_storm_a_prompt_arrives_whole_or_not_at_all(seed: int) -> None:
    clock = FakeClock()
    async with rig(clock=clock, prefill_sends=Storm(seed, 0.03), decode_sends=Storm(seed + 1000, 0.03)) as both:
        for _ in range(3):
            await outcome(both, clock, within_s=60.0)


async def test_storms_are_survived_often_and_not_always() -> None:
    """The storms of the test above must be neither a breeze nor the end of all."""
    results = []
    for seed in range(16):
        clock = FakeClock()
        async with rig(clock=clock, prefill_sends=Storm(seed, 0.03), decode_sends=Storm(seed + 1000, 0.03)) as both:
            results.append(await outcome(both, clock, within_s=60.0))
    assert 3 <= results.count(None) <= 13


# --- incarnations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_frames_of_another_incarnation_are_dropped(side: str) -> None:
    def haunt(envelope: Envelope) -> tuple[Envelope, ...]:
        """Each frame comes once more, first, from a process that died; its chunks hold other bytes."""
        frame = envelope.frame
        if isinstance(frame, Hello):
            return (envelope,)
        if isinstance(frame, Chunk):
            frame = replace(frame, payload=bytes(len(frame.payload)), crc32c=0)
        return (Envelope(envelope.incarnation ^ 2, frame), envelope)

    clock = FakeClock()
    sends: dict[str, Callable[[Envelope], tuple[Envelope, ...]]] = {f"{side}_sends": haunt}
    async with rig(clock=clock, **sends) as both:
        assert await outcome(both, clock) is None
        ends = {"decode": await both.pool.get(both.address), "prefill": next(iter(both.server._sessions))}
        assert ends[side].num_dropped > 10
    assert both.counts.events["verify:checksum"] == 0


class Partition:
    """Lets decode's frames pass until ``after`` has, then nothing in either direction."""

    def __init__(self, after: type[Frame]) -> None:
        self._after = after
        self._is_cut = False

    def __call__(self, envelope: Envelope) -> tuple[Envelope, ...]:
        passes = () if self._is_cut else (envelope,)
        self._is_cut = self._is_cut or isinstance(envelope.frame, self._after)
        return passes

    def silence(self, envelope: Envelope) -> tuple[Envelope, ...]:
        return () if self._is_cut else (envelope,)
