"""Who holds which block. Plain Python, owned by the engine thread, so no locks.

A block is free (count 0) or held by one or more block tables (count >= 1). Choices of one prompt share its
blocks; whoever must write into a shared block copies it first.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from shoal.errors import InternalError, OutOfBlocks


class BlockAllocator:
    """Reference-counted blocks ``0..num_blocks-1``. The lowest free ones go first, so that runs stay contiguous."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks))
        self._counts = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def count(self, block: int) -> int:
        """How many tables hold ``block``."""
        return self._counts[block]

    def allocate(self, num_blocks: int) -> list[int]:
        """Take ``num_blocks`` private blocks, or raise OutOfBlocks and take none."""
        if num_blocks > len(self._free):
            raise OutOfBlocks(f"{num_blocks} blocks wanted, {len(self._free)} of {self.num_blocks} free")
        taken = [heapq.heappop(self._free) for _ in range(num_blocks)]
        for block in taken:
            self._counts[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Hold blocks that someone else already holds."""
        for block in blocks:
            if self._counts[block] == 0:
                raise InternalError(f"block {block} is free and can't be shared")
            self._counts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Give back one hold on each block."""
        for block in blocks:
            if self._counts[block] == 0:
                raise InternalError(f"block {block} is released twice")
            self._counts[block] -= 1
            if self._counts[block] == 0:
                heapq.heappush(self._free, block)
