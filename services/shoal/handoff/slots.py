"""Payload in slots of memory that prefill owns and decode only reads: mapped (shm) or fetched (nixl).

::

    segment    nonce │ slot 0 │ slot 1 │ …        every part begins at a multiple of 4 KiB
    slot       generation │ payload

    prefill  creates the segment ─> Hello                decode  finds it, and its nonce ─> Hello
             writes a free slot ─> Chunk                         copies it, and only then verifies ─> Credit
             the slot is free again

Decode copies from a mapped slot into the request's blocks, which nobody reads before all is verified. A slot is lent
to one chunk until its Credit, or until decode ends the lease (Committed, Cancel): of a lease that has ended nothing is
used any more, whatever a reader that is still busy finds there.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection
from typing import Protocol

import numpy as np

from shoal.backends.cpu.copying import Copier
from shoal.errors import InternalError, ProtocolViolation
from shoal.handoff.frames import Piece
from shoal.model.kv_rows import KvRows
from shoal.wire.frames import MAX_PAYLOAD_BYTES, MAX_SLOTS
from shoal.wire.handoff_messages import Chunk, StagedPayload

GENERATION_BYTES = 8
HEAD_BYTES = 64
"""Before the payload: a cache line, most of it empty."""
ALIGN_BYTES = 4096
"""Not the page of this host: the other one's may be another."""
_ENOUGH_SLOTS = 4


class Slots(Protocol):
    """What a segment says of its slots."""

    @property
    def num_slots(self) -> int: ...

    @property
    def slot_bytes(self) -> int: ...


class SlotLoader:
    """Prefill's end of the slots in ``memory``, whose nonce is written."""

    gathers = False  # into a slot, and not before

    def __init__(self, memory: mmap.mmap, slots: Slots, copier: Copier) -> None:
        self._memory = memory
        self._copier = copier
        self._shape = slots
        self._free_slots = list(range(slots.num_slots))
        self._generations = [0] * slots.num_slots
        self._lent: dict[bytes, dict[int, int]] = {}

    @property
    def num_lent(self) -> int:
        return self._shape.num_slots - len(self._free_slots)

    @property
    def lent_to(self) -> Collection[bytes]:
        return self._lent.keys()

    @property
    def max_bytes(self) -> int:
        return self._shape.slot_bytes

    @property
    def has_room(self) -> bool:
        return bool(self._free_slots)

    def load(self, piece: Piece) -> Chunk:
        """Copy the payload into a free slot, and take its checksum."""
        payload = piece.payload
        if not self.has_room or len(payload) > self.max_bytes:
            raise InternalError(f"{len(payload)} bytes don't fit the staging slots: ask has_room and max_bytes")
        slot = self._free_slots.pop()
        self._generations[slot] += 1
        self._lent.setdefault(piece.lease_id, {})[piece.seq] = slot
        start, generation = slot_offset(self._shape, slot), self._generations[slot]
        # The generation first: who copies from the slot against the rules finds another one afterwards.
        self._memory[start : start + GENERATION_BYTES] = generation.to_bytes(GENERATION_BYTES, "little")
        target = np.frombuffer(self._memory, np.uint8, len(payload), start + HEAD_BYTES)
        if isinstance(payload, KvRows):
            crc32c = self._copier.gather(payload.layers, payload.at, target)
        else:
            crc32c = self._copier.copy(payload, target)
        return piece.loaded(b"", crc32c, StagedPayload(slot, generation, len(payload)))

    def credited(self, lease_id: bytes, seq: int) -> None:
        slot = self._lent.get(lease_id, {}).pop(seq, None)
        if slot is not None:
            self._free_slots.append(slot)

    def ended(self, lease_id: bytes) -> None:
        self._free_slots += self._lent.pop(lease_id, {}).values()


def choose_slots(num_bytes: int, slot_bytes: int) -> tuple[int, int]:
    """How many slots a segment of at most ``num_bytes`` has, and of what size: smaller ones than wanted where few would
    fit, so that some are written while others are read, but none smaller than a frame's payload."""
    while num_slots_in(num_bytes, slot_bytes) < _ENOUGH_SLOTS and slot_bytes // 2 >= MAX_PAYLOAD_BYTES:
        slot_bytes //= 2
    return num_slots_in(num_bytes, slot_bytes), slot_bytes


def num_slots_in(num_bytes: int, slot_bytes: int) -> int:
    """How many slots a segment of at most ``num_bytes`` has; may be none."""
    return max(0, min(MAX_SLOTS, (num_bytes - ALIGN_BYTES) // _stride(slot_bytes)))


def slot_offset(slots: Slots, slot: int) -> int:
    """Where a slot begins, from the segment's first byte."""
    return ALIGN_BYTES + slot * _stride(slots.slot_bytes)


def segment_bytes(slots: Slots) -> int:
    return slot_offset(slots, slots.num_slots)


def check_place(slots: Slots, staged: StagedPayload) -> None:
    """Raises ProtocolViolation for a place that can't be."""
    if staged.slot >= slots.num_slots or staged.num_bytes > slots.slot_bytes:
        raise ProtocolViolation(
            f"{staged.num_bytes} bytes in staging slot {staged.slot}: there are {slots.num_slots} slots of "
            f"{slots.slot_bytes}"
        )


def _stride(slot_bytes: int) -> int:
    """From one slot to the next."""
    return -(-(HEAD_BYTES + slot_bytes) // ALIGN_BYTES) * ALIGN_BYTES
