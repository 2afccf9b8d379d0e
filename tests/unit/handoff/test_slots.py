from __future__ import annotations

import pytest

from shoal.errors import ProtocolViolation
from shoal.handoff.slots import ALIGN_BYTES, check_place, choose_slots, num_slots_in, segment_bytes, slot_offset
from shoal.wire.handoff_messages import RemoteSegment, StagedPayload

SEGMENT = RemoteSegment(b"agent", 1 << 40, 4, 1000, bytes(16))


@pytest.mark.parametrize("staged", [StagedPayload(0, 1, 1), StagedPayload(3, 1, 1000)])
def test_a_place_in_the_segment_is_one(staged: StagedPayload) -> None:
    check_place(SEGMENT, staged)
    end = slot_offset(SEGMENT, staged.slot) + staged.num_bytes
    assert ALIGN_BYTES <= slot_offset(SEGMENT, staged.slot) < end <= segment_bytes(SEGMENT)


@pytest.mark.parametrize("staged", [StagedPayload(4, 1, 1), StagedPayload(2**31 - 1, 1, 1), StagedPayload(0, 1, 1001)])
def test_a_place_outside_the_segment_is_a_violation(staged: StagedPayload) -> None:
    with pytest.raises(ProtocolViolation, match="there are 4 slots of 1000"):
        check_place(SEGMENT, staged)


@pytest.mark.parametrize(
    ("num_bytes", "slot_bytes", "num_slots"),
    [(0, 1000, 0), (2 * ALIGN_BYTES - 1, 1000, 0), (2 * ALIGN_BYTES, 1000, 1), (5 * ALIGN_BYTES, 4096, 2)],
)
def test_a_head_and_the_segments_own_take_room_too(num_bytes: int, slot_bytes: int, num_slots: int) -> None:
    assert num_slots_in(num_bytes, slot_bytes) == num_slots
    assert num_slots == 0 or segment_bytes(RemoteSegment(b"a", 1, num_slots, slot_bytes, b"")) <= num_bytes


MIB = 1 << 20


@pytest.mark.parametrize(
    ("num_bytes", "wanted", "num_slots", "slot_bytes"),
    [
        (64 * MIB, 8 * MIB, 7, 8 * MIB),
        (32 * MIB, 8 * MIB, 7, 4 * MIB),  # three large ones would fit
        (8 * MIB, 8 * MIB, 7, MIB),
        (3 * MIB, 8 * MIB, 2, MIB),  # no smaller ones than frames
        (MIB, 8 * MIB, 0, MIB),
        (3 * ALIGN_BYTES, 1000, 2, 1000),  # and none smaller than asked for that are small
    ],
)
def test_where_few_slots_would_fit_they_are_smaller(
    num_bytes: int, wanted: int, num_slots: int, slot_bytes: int
) -> None:
    assert choose_slots(num_bytes, wanted) == (num_slots, slot_bytes)
