"""Staging slots: memory that payload passes through outside the frames (shared memory, RDMA).

Who owns them may not be the one who writes, and then can't make it stop: a transfer has no abort. So a slot goes back
to work only when its writer is known to have stopped. One whose writer never answered is *retired*: it is never used
again in this process.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.errors import InternalError


@dataclass(frozen=True, slots=True)
class StagingSlot:
    """One lending of a slot. Each lending has its own ``generation``, which the chunks of its lease name."""

    index: int
    generation: int
    num_bytes: int


class StagingSlots:
    """``num_slots`` slots of ``slot_bytes`` each.

    What is lent may have to be retired, so both together never exceed ``max_retired_bytes``; beyond it, or with no
    slot free, ``take`` gives none and the payload travels inline.
    """

    def __init__(self, num_slots: int, slot_bytes: int, *, max_retired_bytes: int) -> None:
        self._slot_bytes = slot_bytes
        self._max_retired_bytes = max_retired_bytes
        self._free = list(range(num_slots))
        self._generations = [0] * num_slots
        self._lent: dict[int, StagingSlot] = {}
        self.num_retired = 0

    @property
    def num_lent(self) -> int:
        return len(self._lent)

    @property
    def retired_bytes(self) -> int:
        return self.num_retired * self._slot_bytes

    def take(self) -> StagingSlot | None:
        """Lend a slot under a new generation, or ``None``."""
        at_risk_bytes = (self.num_lent + self.num_retired + 1) * self._slot_bytes
        if not self._free or at_risk_bytes > self._max_retired_bytes:
            return None
        index = self._free.pop()
        self._generations[index] += 1
        slot = StagingSlot(index, self._generations[index], self._slot_bytes)
        self._lent[index] = slot
        return slot

    def give_back(self, slot: StagingSlot) -> None:
        """The writer has stopped: the slot may be lent again."""
        self._end(slot)
        self._free.append(slot.index)

    def retire(self, slot: StagingSlot) -> None:
        """The writer may still be writing: nobody gets this slot again."""
        self._end(slot)
        self.num_retired += 1

    def _end(self, slot: StagingSlot) -> None:
        if self._lent.pop(slot.index, None) != slot:
            raise InternalError(f"{slot} isn't lent")
