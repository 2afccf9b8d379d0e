"""Where arriving K/V land: the request's reserved blocks, filled by the copy thread."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Callable, Sequence

import torch

from shoal.errors import InternalError
from shoal.heartbeat import Heartbeat, SingleThread
from shoal.kv.pool import KvPool
from shoal.messages import Chunk, WireMode

Project = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""States ``[tokens, hidden]`` and positions ``[tokens]`` -> K/V of the skipped layers ``[S, tokens, 2, kv_heads,
head_dim]``."""

# That torch could write to a payload: here it's only read, and a copy would be the way to say so.
warnings.filterwarnings("ignore", "The given buffer is not writable")


class PoolSink:
    """Copies chunks into ``pool``, and of states what ``project`` makes of them. One thread: copies are short, and two
    would only fight over memory bandwidth."""

    def __init__(self, pool: KvPool, project: Project | None = None) -> None:
        self._pool = pool
        self._project = project
        self._copy_thread = SingleThread("copy", _compute_alone)

    @property
    def heartbeat(self) -> Heartbeat:
        return self._copy_thread.heartbeat

    async def write(self, blocks: Sequence[int], chunk: Chunk) -> None:
        """Copy a verified chunk into the blocks that hold its tokens."""
        await asyncio.get_running_loop().run_in_executor(self._copy_thread, self._copy, blocks, chunk)

    def close(self) -> None:
        """Finish the copy under way, and stop."""
        self._copy_thread.shutdown()

    @torch.inference_mode()
    def _copy(self, blocks: Sequence[int], chunk: Chunk) -> None:
        device = self._pool.layers[0].device
        slots = torch.as_tensor(self._pool.layout.slots(blocks, chunk.token_start, chunk.token_end)).to(device)
        arrived = torch.frombuffer(chunk.payload, dtype=self._pool.dtype)
        kv = self._kv_of(chunk, arrived.to(device))
        self._pool.write_layers(chunk.layer_start, slots, kv)

    def _kv_of(self, chunk: Chunk, arrived: torch.Tensor) -> torch.Tensor:
        """``[layers, tokens, 2, kv_heads, head_dim]``, contiguous."""
        layout, num_tokens = self._pool.layout, chunk.token_end - chunk.token_start
        if chunk.wire_mode is WireMode.KV:
            num_layers = chunk.layer_end - chunk.layer_start
            return arrived.view(num_layers, num_tokens, 2, layout.num_kv_heads, layout.head_dim)
        if self._project is None:
            raise InternalError("states arrived where nothing is projected")
        positions = torch.arange(chunk.token_start, chunk.token_end, device=arrived.device)
        return self._project(arrived.view(num_tokens, -1), positions).to(self._pool.dtype).contiguous()


def _compute_alone() -> None:
    """One compute thread for the calling thread: a team of OpenMP's own would slow the engine's (engine/build.py).

    torch also takes the number for threads that compute for the first time from now on: another one restores that.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    restore = threading.Thread(target=torch.set_num_threads, args=(num_threads,))
    restore.start()
    restore.join()
