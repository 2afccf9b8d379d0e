from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.handoff.arrivals import Arrivals, LeaseFrame
from shoal.wire.handoff_messages import Chunk, Seal, StagedPayload

LEASES = (bytes(16), bytes(15) + b"1")


def chunk(seq: int, lease_id: bytes = LEASES[0]) -> Chunk:
    return Chunk(lease_id, seq, 0, 1, 0, 1, 0, b"", StagedPayload(seq, 1, 100))


def seal(lease_id: bytes = LEASES[0]) -> Seal:
    return Seal(lease_id, 2, bytes(32), 0, 0.0, 0.0)


def test_a_seal_waits_for_the_chunks_before_it_and_another_lease_does_not() -> None:
    got: list[LeaseFrame] = []
    arrivals = Arrivals(got.append)
    first, second = arrivals.expect(chunk(0)), arrivals.expect(chunk(1))
    arrivals.add(seal())
    arrivals.add(seal(LEASES[1]))
    assert got == [seal(LEASES[1])]
    second(replace(chunk(1), payload=b"1"))
    assert len(got) == 1  # not before the one that came before it
    first(replace(chunk(0), payload=b"0"))
    assert [getattr(frame, "payload", frame) for frame in got[1:]] == [b"0", b"1", seal()]


def test_what_is_on_its_way_is_known_until_it_is_here() -> None:
    arrivals = Arrivals(lambda frame: None)
    arrived = arrivals.expect(chunk(3))
    arrivals.expect(chunk(4))
    assert arrivals.expects(LEASES[0], 3) and not arrivals.expects(LEASES[0], 5)
    assert not arrivals.expects(LEASES[1], 3)
    assert (arrivals.num_bytes(LEASES[0]), arrivals.num_bytes(LEASES[1])) == (200, 0)
    arrived(chunk(3))
    assert not arrivals.expects(LEASES[0], 3)
    assert arrivals.num_bytes(LEASES[0]) == 100


@pytest.mark.filterwarnings("error")
@given(st.lists(st.tuples(st.sampled_from(["add", "expect"]), st.integers(0, 1)), max_size=20), st.randoms())
def test_each_leases_frames_come_once_and_in_order(frames: list[tuple[str, int]], random: object) -> None:
    got: list[LeaseFrame] = []
    arrivals = Arrivals(got.append)
    away = []
    for seq, (way, lease) in enumerate(frames):
        one = chunk(seq, LEASES[lease])
        if way == "add":
            arrivals.add(one)
        else:
            away.append((arrivals.expect(one), one))
    random.shuffle(away)  # type: ignore[attr-defined]
    for arrived, one in away:
        arrived(one)
    for index, lease_id in enumerate(LEASES):
        wanted = [seq for seq, (_, lease) in enumerate(frames) if lease == index]
        assert [frame.seq for frame in got if frame.lease_id == lease_id] == wanted  # type: ignore[union-attr]
    assert not arrivals._waiting
