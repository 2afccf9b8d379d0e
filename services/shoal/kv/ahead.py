"""Pages of a pool, taken from the system before a prompt wants them.

The system gives memory as it's first written: of a pool, with the first prompts that come further into it than any
before. Where the machine is virtual and its host does the same, 2 MiB then take milliseconds, and a prompt of 1,800
tokens of SmolLM2 wants some dozens of them. A whole pool may be gigabytes that nobody ever uses. So what is taken is
always a little more than was used at once so far.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Callable, Sequence

from shoal.kv.blocks import BlockAllocator
from shoal.kv.pool import KvPool

AHEAD_BYTES = 128 << 20
"""Of all layers together: some 5,000 tokens of SmolLM2's 30."""
_PIECE_BYTES = 2 << 20
"""A huge page; what is taken at once, so that nothing waits for long behind it."""
_POPULATE_WRITE = 23
"""madvise(2): what is written there stays, whoever writes meanwhile."""
Madvise = Callable[[int, int, int], int]
_log = logging.getLogger(__name__)


class Ahead:
    """``pool`` on the host, whose blocks are those of ``allocators``: all layers', and those of layers that are apart,
    if any are. Belongs to one thread; others may write to the pool meanwhile."""

    def __init__(self, pool: KvPool, allocators: Sequence[BlockAllocator], num_bytes: int = AHEAD_BYTES) -> None:
        self._parts = [_Part(pool, allocator, is_apart=index > 0) for index, allocator in enumerate(allocators)]
        self._num_bytes = num_bytes
        self._madvise = _madvise() if pool.host_rows() is not None else None

    @property
    def is_far_enough(self) -> bool:
        """Nothing is to be taken, unless more is used."""
        return self._madvise is None or all(part.is_done(self._num_bytes) for part in self._parts)

    def take(self) -> None:
        """A piece, if there is one to take. What can't be had (no room, Linux before 5.14) isn't asked for again."""
        for part in self._parts:
            if self._madvise is not None and not part.is_done(self._num_bytes):
                address, num_bytes = part.next()
                if self._madvise(address, num_bytes, _POPULATE_WRITE):
                    _log.info("no memory ahead of use: %s", os.strerror(ctypes.get_errno()))
                    self._madvise = None


class _Part:
    """Layers that share one count of blocks: piece by piece of each, one layer after the other."""

    def __init__(self, pool: KvPool, allocator: BlockAllocator, *, is_apart: bool) -> None:
        self._allocator = allocator
        layers = [layer for index, layer in enumerate(pool.layers) if (index in pool.apart) == is_apart]
        held = [*layers, *(() if is_apart else (pool.states,))]
        self._layers = [one for one in held if one.nbytes]
        self._block_bytes = sum(one.nbytes for one in self._layers) // allocator.num_blocks or 1
        self._turn = 0
        self._begin = 0  # bytes of each layer

    def is_done(self, num_bytes: int) -> bool:
        """Whether ``num_bytes`` more than were ever used are there."""
        num_blocks = self._allocator.num_ever_used + num_bytes // self._block_bytes
        share = min(1.0, num_blocks / self._allocator.num_blocks)
        return not self._layers or self._begin >= share * max(one.nbytes for one in self._layers)

    def next(self) -> tuple[int, int]:
        """The address and length of a piece, which counts as taken."""
        layer = self._layers[self._turn]
        begin = min(self._begin, layer.nbytes)
        self._turn += 1
        if self._turn == len(self._layers):
            self._turn, self._begin = 0, self._begin + _PIECE_BYTES
        return layer.data_ptr() + begin, min(_PIECE_BYTES, layer.nbytes - begin)


def _madvise() -> Madvise | None:
    if sys.platform != "linux":
        return None
    try:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):  # a C library without it
        return None
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise
