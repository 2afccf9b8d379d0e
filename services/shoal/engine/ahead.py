"""Pages of a pool, taken from the system before a prompt wants them.

The system gives memory as it's first written. Where a pool remembers what it computed, that is with each new prompt: it
comes into blocks that nobody has had before, until all have been used. Where the machine is virtual and its host does
the same, 2 MiB take milliseconds, and a prompt of 1,800 tokens of SmolLM2 wants some dozens of them. A whole pool may
be gigabytes that nobody ever uses. So what is taken is always a little more than was ever used.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Callable

from shoal.engine.blocks import BlockAllocator
from shoal.model.kv_pool import KvPool

AHEAD_BYTES = 128 << 20
"""At least, of all layers together: nearly 6,000 tokens of SmolLM2's 30."""
_PIECE_BYTES = 2 << 20
"""A huge page; what is taken at once, so that nothing waits for long behind it."""
_POPULATE_WRITE = 23
"""madvise(2): what is written there stays, whoever writes meanwhile."""
_Madvise = Callable[[int, int, int], int]
_log = logging.getLogger(__name__)


class Ahead:
    """Of all layers of ``pool``, whose blocks are ``allocator``'s, piece by piece, and of all alike. Belongs to one
    thread; others may write to the pool meanwhile. Of a pool that isn't the host's nothing is taken."""

    def __init__(self, pool: KvPool, allocator: BlockAllocator, num_bytes: int = AHEAD_BYTES) -> None:
        self._allocator = allocator
        self._layers = [one for one in (*pool.layers, pool.states) if one.nbytes]
        self._taken = [0] * len(self._layers)  # bytes, from each one's beginning
        self._num_blocks = num_bytes * allocator.num_blocks // sum(one.nbytes for one in self._layers)
        self._madvise = _madvise() if pool.host_rows() is not None else None

    @property
    def is_far_enough(self) -> bool:
        """Nothing is to be taken, unless more is used."""
        share = min(1.0, (self._allocator.num_ever_used + self._num_blocks) / self._allocator.num_blocks)
        return self._madvise is None or min(self._shares()) >= share

    def take(self) -> None:
        """A piece of the layer that has the least of its own. What can't be had (Linux before 5.14) isn't asked for
        again."""
        shares = self._shares()
        index = shares.index(min(shares))
        layer, begin = self._layers[index], self._taken[index]
        num_bytes = min(_PIECE_BYTES, layer.nbytes - begin)
        if self._madvise is None or num_bytes == 0:
            return
        self._taken[index] += num_bytes
        if self._madvise(layer.data_ptr() + begin, num_bytes, _POPULATE_WRITE):
            _log.info("no memory ahead of use: %s", os.strerror(ctypes.get_errno()))
            self._madvise = None

    def _shares(self) -> list[float]:
        return [taken / layer.nbytes for taken, layer in zip(self._taken, self._layers, strict=True)]


def _madvise() -> _Madvise | None:
    if sys.platform != "linux":
        return None
    try:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):  # a C library without it
        return None
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise
