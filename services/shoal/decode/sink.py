"""Where arriving K/V land: the request's reserved blocks, filled by the copy thread."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from shoal.kv.pool import KvPool
from shoal.messages import Chunk

# That torch could write to a payload: here it's only read, and a copy would be the way to say so.
warnings.filterwarnings("ignore", "The given buffer is not writable")


class PoolSink:
    """Copies chunks into ``pool``. One thread: copies are short, and two would only fight over memory bandwidth."""

    def __init__(self, pool: KvPool) -> None:
        self._pool = pool
        self._copy_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shoal-copy")

    async def write(self, blocks: Sequence[int], chunk: Chunk) -> None:
        """Copy a verified chunk into the blocks that hold its tokens."""
        await asyncio.get_running_loop().run_in_executor(self._copy_thread, self._copy, blocks, chunk)

    def close(self) -> None:
        """Finish the copy under way, and stop."""
        self._copy_thread.shutdown()

    def _copy(self, blocks: Sequence[int], chunk: Chunk) -> None:
        layout = self._pool.layout
        shape = (
            chunk.layer_end - chunk.layer_start, chunk.token_end - chunk.token_start, 2, layout.num_kv_heads,
            layout.head_dim,
        )  # fmt: skip
        kv = torch.frombuffer(chunk.payload, dtype=self._pool.dtype).view(shape)
        slots = torch.as_tensor(layout.slots(blocks, chunk.token_start, chunk.token_end))
        device = self._pool.layers[0].device
        self._pool.write_layers(chunk.layer_start, slots.to(device), kv.to(device))
