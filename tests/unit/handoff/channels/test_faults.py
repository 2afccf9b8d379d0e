from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from more_faults import Reset, Storm

from shoal.errors import PeerGone
from shoal.handoff.channels.faults import Corrupt, Delay, Drop, Duplicate, Fault, Truncate, flip_bit
from shoal.handoff.channels.memory import Rule
from shoal.wire.handoff_messages import Beat, Chunk, Envelope, Nack, StagedPayload

CHUNK = Chunk(bytes(16), 0, 0, 1, 0, 1, 0, b"\x00\xff")


def nacks(count: int) -> list[Envelope]:
    return [Envelope(1, Nack(bytes(16), seq)) for seq in range(count)]


def through(rule: Rule, envelopes: list[Envelope]) -> list[int]:
    """Sequence numbers of what arrives."""
    arrived = [delivered.frame for envelope in envelopes for delivered in rule(envelope)]
    return [frame.seq for frame in arrived if isinstance(frame, Nack)]


def is_second(frame: object) -> bool:
    return isinstance(frame, Nack) and frame.seq == 1


@pytest.mark.parametrize(
    ("rule", "arrives"),
    [
        (Drop(is_second), [0, 2, 3]),
        (Duplicate(is_second), [0, 1, 1, 2, 3]),
        (Delay(is_second), [0, 2, 1, 3]),
        (Delay(is_second, num_frames=2), [0, 2, 3, 1]),
        (Delay(Nack, times=2), [2, 0, 1, 3]),
        (Drop(Nack, times=3), [3]),
        (Drop(Beat), [0, 1, 2, 3]),
    ],
)
def test_a_fault_strikes_where_it_is_meant(rule: Fault, arrives: list[int]) -> None:
    assert through(rule, nacks(4)) == arrives


def test_reset_breaks_at_its_frame() -> None:
    rule = Reset(is_second)
    assert through(rule, nacks(1)) == [0]
    with pytest.raises(PeerGone):
        rule(nacks(2)[1])


def test_corrupt_flips_one_bit_of_a_payload_and_nothing_else() -> None:
    envelope = Envelope(1, CHUNK)
    assert list(Corrupt(Chunk)(envelope)) == [replace(envelope, frame=replace(CHUNK, payload=b"\x01\xff"))]
    assert flip_bit(envelope, 15).frame == replace(CHUNK, payload=b"\x00\x7f")
    assert flip_bit(flip_bit(envelope, 16), 16) == envelope
    assert flip_bit(Envelope(1, Beat()), 3) == Envelope(1, Beat())


def test_truncate_loses_the_second_half_of_a_payload_and_nothing_else() -> None:
    envelope = Envelope(1, CHUNK)
    assert list(Truncate(Chunk)(envelope)) == [replace(envelope, frame=replace(CHUNK, payload=b"\x00"))]
    staged = replace(CHUNK, payload=b"", staged=StagedPayload(3, 1, 64))
    [cut] = Truncate(Chunk)(Envelope(1, staged))
    assert cut.frame == replace(staged, staged=StagedPayload(3, 1, 32))
    assert list(Truncate(Beat)(Envelope(1, Beat()))) == [Envelope(1, Beat())]


def test_a_storm_is_the_same_for_the_same_seed_and_has_every_fault() -> None:
    first, again, other = (through(Storm(seed, 0.1), nacks(500)) for seed in (1, 1, 2))
    assert first == again != other
    times = Counter(first)
    assert set(times.values()) == {1, 2}
    assert len(times) < 500
    assert sorted(first) != first
