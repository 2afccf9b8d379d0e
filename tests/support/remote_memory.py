"""What NIXL does, within one process and by nobody but the event loop: a real fake of a carrier between hosts."""

from __future__ import annotations

import asyncio
import mmap
import secrets
from collections.abc import Callable
from dataclasses import replace

from shoal.backends.cpu.copying import Copier
from shoal.errors import ShoalError
from shoal.handoff.slots import GENERATION_BYTES, HEAD_BYTES, SlotLoader, num_slots_in, segment_bytes, slot_offset
from shoal.wire.frames import NONCE_BYTES
from shoal.wire.handoff_messages import Carrier, Chunk, RemoteSegment, StagedPayload


class Remote:
    """All memory that can be read from afar, by its nonce."""

    def __init__(self) -> None:
        self.loaders: dict[bytes, FakeLoader] = {}

    async def open_loader(self, slot_bytes: int, max_bytes: int) -> FakeLoader:
        await asyncio.sleep(0)  # as an agent takes its time
        loader = FakeLoader(slot_bytes, max_bytes)
        self.loaders[loader.segment.nonce] = loader
        return loader

    async def attach(self, segment: RemoteSegment, failed: Callable[[ShoalError], None]) -> FakeUnloader | None:
        await asyncio.sleep(0)
        loader = self.loaders.get(segment.nonce)
        return None if loader is None or loader.is_closed else FakeUnloader(loader)


class FakeLoader(SlotLoader):
    carrier = Carrier.NIXL

    def __init__(self, slot_bytes: int, max_bytes: int) -> None:
        num_slots = num_slots_in(max_bytes, slot_bytes)
        self.segment = RemoteSegment(b"fake", 1 << 40, num_slots, slot_bytes, secrets.token_bytes(NONCE_BYTES))
        super().__init__(mmap.mmap(-1, segment_bytes(self.segment)), self.segment, Copier())

    @property
    def is_closed(self) -> bool:
        return self._memory.closed

    def read(self, offset: int, num_bytes: int) -> bytes:
        return b"" if self.is_closed else self._memory[offset : offset + num_bytes]

    def hide(self) -> None: ...

    def close(self) -> None:
        self._memory.close()


class FakeUnloader:
    """Reads later than it's asked to, one after another."""

    carrier = Carrier.NIXL

    def __init__(self, loader: FakeLoader) -> None:
        self.segment = loader.segment
        self._loader = loader
        self._is_closed = False

    def unload(self, chunk: Chunk, staged: StagedPayload, arrived: Callable[[Chunk], None]) -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self._read, chunk, staged, arrived)

    def is_there(self, staged: StagedPayload) -> bool:
        return True

    def close(self) -> None:
        self._is_closed = True

    def _read(self, chunk: Chunk, staged: StagedPayload, arrived: Callable[[Chunk], None]) -> None:
        found = self._loader.read(slot_offset(self.segment, staged.slot), HEAD_BYTES + staged.num_bytes)
        is_there = int.from_bytes(found[:GENERATION_BYTES], "little") == staged.generation
        if not self._is_closed:
            arrived(replace(chunk, payload=found[HEAD_BYTES:] if is_there else b""))
