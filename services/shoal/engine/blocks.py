"""Who holds which block. Plain Python, owned by the engine thread, so no locks.

A block is held by one or more block tables (count >= 1) or by none; then it's free, and may be remembered for what it
holds (prefix.py) until another needs the place. Choices of one prompt share its blocks; whoever must write into a
shared block copies it first.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from itertools import takewhile

from shoal.engine.prefix import Piece, PrefixCache
from shoal.errors import InternalError, OutOfBlocks


class BlockAllocator:
    """Reference-counted blocks ``0..num_blocks-1``. The lowest free ones go first, so that runs stay contiguous.

    With ``any_source`` (prefix.py), the blocks' contents are remembered; ``None``: nothing is.
    """

    def __init__(self, num_blocks: int, *, any_source: bool | None = None) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks))
        self._counts = [0] * num_blocks
        self._reserved = [0] * num_blocks  # of those counts, how much is of sequences that don't run yet
        self.num_reserved = 0  # blocks that such sequences hold, each once
        self.num_only_reserved = 0  # that nobody else holds
        self.num_ever_used = 0  # from the first on, up to the last that was ever taken
        self._distrusted: set[int] = set()  # held, and never to be remembered
        self.prefixes = None if any_source is None else PrefixCache(any_source=any_source)

    @property
    def num_free(self) -> int:
        """Those that are remembered included: they go last."""
        return len(self._free) + (0 if self.prefixes is None else self.prefixes.num_idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def count(self, block: int) -> int:
        """How many tables hold ``block``."""
        return self._counts[block]

    def allocate(self, num_blocks: int) -> list[int]:
        """Take ``num_blocks`` private blocks, or raise OutOfBlocks and take none."""
        if num_blocks > self.num_free:
            raise OutOfBlocks(f"{num_blocks} blocks wanted, {self.num_free} of {self.num_blocks} free")
        while len(self._free) < num_blocks and self.prefixes is not None:
            self._free_unheld(self.prefixes.evict())
        taken = [heapq.heappop(self._free) for _ in range(num_blocks)]
        for block in taken:
            self._counts[block] = 1
            self.num_ever_used = max(self.num_ever_used, block + 1)
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Hold blocks that someone else already holds, or that are remembered."""
        for block in blocks:
            if self._counts[block] == 0:
                if self.prefixes is None or block not in self.prefixes:
                    raise InternalError(f"block {block} is free and can't be shared")
                self.prefixes.take(block)
            if 0 < self._reserved[block] == self._counts[block]:
                self.num_only_reserved -= 1
            self._counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one hold on each block of a table."""
        for block in reversed(blocks):
            if self._counts[block] == 0:
                raise InternalError(f"block {block} is released twice")
            self._counts[block] -= 1
            if 0 < self._reserved[block] == self._counts[block]:
                self.num_only_reserved += 1
            if self._counts[block] == 0:
                self._distrusted.discard(block)
                if self.prefixes is not None and block in self.prefixes:
                    self.prefixes.rest(block)
                else:
                    heapq.heappush(self._free, block)

    def reserve(self, blocks: Iterable[int]) -> None:
        """A table that holds ``blocks`` is of a sequence that doesn't run yet. What such tables hold is asked for in
        every step, so it's counted as it changes."""
        for block in blocks:
            self._reserved[block] += 1
            self.num_reserved += self._reserved[block] == 1
            self.num_only_reserved += self._reserved[block] == self._counts[block]

    def unreserve(self, blocks: Iterable[int]) -> None:
        """Its sequence runs now, or ends: to be said before any of them is released."""
        for block in blocks:
            if self._reserved[block] == 0:
                raise InternalError(f"block {block} isn't reserved")
            self.num_only_reserved -= self._reserved[block] == self._counts[block]
            self._reserved[block] -= 1
            self.num_reserved -= self._reserved[block] == 0

    def remember(self, tenant: str, pieces: Sequence[Piece], blocks: Sequence[int]) -> None:
        """That ``blocks``, held ones, hold ``pieces``: up to the first that can't be trusted."""
        if self.prefixes is not None:
            sound = list(takewhile(lambda block: block not in self._distrusted, blocks))
            self.prefixes.insert(tenant, pieces[: len(sound)], sound)

    def forget(self, blocks: Sequence[int]) -> None:
        """What ``blocks`` hold can't be trusted, nor what was computed after it: never share it again, whoever else
        holds it now."""
        if self.prefixes is not None:
            gone = self.prefixes.forget(blocks)
            self._distrusted.update(block for block in (*blocks, *gone) if self._counts[block])
            self._free_unheld(gone)

    def _free_unheld(self, forgotten: Iterable[int]) -> None:
        for block in forgotten:
            if self._counts[block] == 0:
                heapq.heappush(self._free, block)
