from __future__ import annotations

import random
from collections import Counter

from shoal.handoff.channels.memory import memory_pair
from shoal.wire.handoff_messages import Beat, Chunk, Envelope
from shoal_lab.chaos.channel import FaultyChannel
from shoal_lab.chaos.switchboard import FrameFault, Switchboard, switching

NUM_FRAMES = 200


def chunks() -> list[Envelope]:
    return [Envelope(1, Chunk(bytes(16), seq, 0, 1, 0, 1, 0, b"\x00\x01")) for seq in range(NUM_FRAMES)]


async def through(switchboard: Switchboard, envelopes: list[Envelope], *, is_sent: bool) -> list[Envelope]:
    """What arrives, before a last frame that no fault meets."""
    near, far = memory_pair()
    faulty = FaultyChannel(near, switchboard, random.Random(1))
    sender, receiver = (faulty, far) if is_sent else (far, faulty)
    for envelope in envelopes:
        await sender.send(envelope)
    if is_sent:
        switchboard.set_frame_fault(FrameFault.NONE, 0)
    await sender.send(Envelope(1, Beat()))
    await near.close()
    arrived = []
    while not isinstance((envelope := await receiver.receive()).frame, Beat):
        arrived.append(envelope)
    return arrived


async def test_frames_that_are_sent_meet_the_fault_of_the_hour():
    found = {}
    for fault in FrameFault:
        with switching() as switchboard:
            switchboard.set_frame_fault(fault, 0.2)
            found[fault] = [one.frame for one in await through(switchboard, chunks(), is_sent=True)]
    sequence = {fault: [frame.seq for frame in frames] for fault, frames in found.items()}
    everything = list(range(NUM_FRAMES))
    assert sequence[FrameFault.NONE] == everything
    assert NUM_FRAMES / 2 < len(sequence[FrameFault.DROP]) < NUM_FRAMES
    assert set(Counter(sequence[FrameFault.DUPLICATE]).values()) == {1, 2}
    assert sequence[FrameFault.REORDER] != everything
    assert set(everything) - set(sequence[FrameFault.REORDER]) <= {NUM_FRAMES - 1}  # the last may be overtaken
    assert sequence[FrameFault.CORRUPT] == sequence[FrameFault.TRUNCATE] == everything
    assert {bytes(frame.payload) for frame in found[FrameFault.CORRUPT]} == {b"\x00\x01", b"\x01\x01"}
    assert {bytes(frame.payload) for frame in found[FrameFault.TRUNCATE]} == {b"\x00\x01", b"\x00"}


async def test_frames_that_are_received_meet_it_too():
    with switching() as switchboard:
        switchboard.set_frame_fault(FrameFault.CORRUPT, 0.2)
        arrived = [one.frame for one in await through(switchboard, chunks(), is_sent=False)]
    assert {bytes(frame.payload) for frame in arrived} == {b"\x00\x01", b"\x01\x01"}
