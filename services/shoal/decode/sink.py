"""Where arriving K/V land: the request's reserved blocks.

What is projected, on its way to a device, or takes long for another reason, a thread does. The rest the event loop
copies by itself: to ask a thread and hear of it again takes both cores longer than a millisecond's copy.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from shoal.backends.cpu.copying import Copier
from shoal.errors import InternalError
from shoal.model.kv_pool import KvPool, on_device
from shoal.process.heartbeat import Heartbeat, SingleThread
from shoal.wire.handoff_messages import Chunk, WireMode

_AT_ONCE_BYTES = 8 << 20
"""A millisecond of the kernel's, into memory that was used before; ``handoff.slot_bytes`` is as much by default."""
_UNWRITTEN_BYTES = 64 << 20
"""That may be on a GPU beside the pool: some milliseconds of what a link to it brings."""
Project = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""States ``[tokens, hidden]`` and positions ``[tokens]`` -> K/V of the skipped layers ``[S, tokens, 2, kv_heads,
head_dim]``."""


class PoolSink:
    """Copies chunks into ``pool``, and of states what ``project`` makes of them.

    Of the event loop's copies and the thread's, one at a time each: more would only fight over memory bandwidth.
    """

    def __init__(self, pool: KvPool, project: Project | None = None, copier: Copier | None = None) -> None:
        self._pool = pool
        self._project = project
        self._copier = copier or Copier()
        self._held = pool.host_rows()
        self._private = np.empty(0, np.uint8)
        self._unwritten: deque[tuple[torch.cuda.Event, int]] = deque()
        self._copy_thread = SingleThread("copy", _compute_alone)
        self._turn = asyncio.Lock()

    @property
    def heartbeat(self) -> Heartbeat:
        return self._copy_thread.heartbeat

    async def write(self, blocks: Sequence[int], chunk: Chunk, is_there: Callable[[], bool]) -> int | None:
        """Copy a chunk into the blocks that hold its tokens; the CRC32C of what was copied, if it stayed there."""
        if self._is_quick(chunk):
            async with self._turn:
                # What else the event loop has to do comes first, also to ask for the next frame.
                await asyncio.sleep(0)
                return self._copy_if_there(blocks, chunk, is_there)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._copy_thread, self._copy_if_there, blocks, chunk, is_there)

    def close(self) -> None:
        """Finish the copy under way, and stop."""
        self._copy_thread.shutdown()

    def _is_quick(self, chunk: Chunk) -> bool:
        if self._held is None or chunk.wire_mode is not WireMode.KV:
            return False
        return self._copier.has_kernel_for(self._held[0].shape[1]) and chunk.num_bytes <= _AT_ONCE_BYTES

    def _copy_if_there(self, blocks: Sequence[int], chunk: Chunk, is_there: Callable[[], bool]) -> int | None:
        if not is_there():
            return None
        crc32c = self._copy(blocks, chunk)
        return crc32c if is_there() else None

    @torch.inference_mode()
    def _copy(self, blocks: Sequence[int], chunk: Chunk) -> int:
        slots = self._pool.layout.slots(blocks, chunk.token_start, chunk.token_end)
        if self._held is not None and chunk.wire_mode is WireMode.KV:
            return self._copier.scatter(chunk.payload, self._held[chunk.layer_start : chunk.layer_end], slots)
        # What is projected, or sent to a device, must be what was checked.
        private = self._private_bytes(chunk.num_bytes)
        crc32c = self._copier.copy(chunk.payload, private)
        if crc32c == chunk.crc32c:
            device = self._pool.layers[0].device
            arrived, at = on_device(device, torch.from_numpy(private).view(self._pool.dtype), torch.from_numpy(slots))
            self._pool.write_layers(chunk.layer_start, at, self._kv_of(chunk, arrived))
            self._bound_unwritten(device, chunk.num_bytes)
        return crc32c

    def _bound_unwritten(self, device: torch.device, num_bytes: int) -> None:
        """A GPU puts them into their blocks after the steps that it has to compute; until then they are there twice."""
        if device.type != "cuda":
            return
        written = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's own
        written.record(torch.cuda.current_stream(device))
        self._unwritten.append((written, num_bytes))
        while sum(held for _, held in self._unwritten) > _UNWRITTEN_BYTES:
            self._unwritten.popleft()[0].synchronize()

    def _private_bytes(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Of the copy thread alone, until its next copy."""
        if len(self._private) < num_bytes:
            is_pinned = self._pool.layers[0].is_cuda  # what goes on to a GPU goes several times as fast from there
            self._private = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned).numpy()
        return self._private[:num_bytes]

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
