"""Decode's end of a session whose payload it reads through NIXL."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

from shoal.errors import ShoalError, Unavailable
from shoal.handoff.carriers.nixl.reader import Read, Reader, reader_bytes
from shoal.handoff.carriers.nixl.retired import Retired
from shoal.handoff.carriers.nixl.thread import NixlThread
from shoal.handoff.slots import GENERATION_BYTES, HEAD_BYTES, slot_offset
from shoal.wire.frames import NONCE_BYTES
from shoal.wire.handoff_messages import Carrier, Chunk, RemoteSegment, StagedPayload

_log = logging.getLogger(__name__)


class NixlUnloader:
    """Made by ``attach``. Private copies are views of the reader's buffers, which come back when they end."""

    carrier = Carrier.NIXL

    def __init__(self, thread: NixlThread, reader: Reader, retired: Retired, segment: RemoteSegment) -> None:
        self.segment = segment
        self._thread = thread
        self._reader = reader
        self._retired = retired
        self._loop = asyncio.get_running_loop()
        self.freed: Future[None] | None = None

    @classmethod
    async def attach(
        cls,
        thread: NixlThread,
        retired: Retired,
        segment: RemoteSegment,
        failed: Callable[[ShoalError], None],
        *,
        deadline_s: float,
    ) -> NixlUnloader | None:
        """Read the nonce of ``segment``; ``None`` if that can't be done within half of ``deadline_s``, the READs'.

        ``failed`` is called on the event loop when a READ of the session fails or is overdue.
        """
        make = partial(_make, thread, retired, segment, deadline_s / 2)
        try:
            reader = await thread.call(make, undo=partial(_give_back, thread, retired))
        except (OSError, Unavailable) as error:
            _log.warning("prefill's memory can't be read from here: %s", error)
            return None
        unloader = cls(thread, reader, retired, segment)
        try:
            # Where the thread has ended meanwhile, nobody says that the READ is overdue.
            async with asyncio.timeout(deadline_s):
                nonce = await unloader._read_nonce()
        except TimeoutError:
            nonce = None
        except BaseException:
            unloader.close()
            raise
        if nonce is None or not hmac.compare_digest(nonce, segment.nonce):
            _log.warning("prefill's memory can't be read from here: %s", "no answer" if nonce is None else "not this")
            unloader.close()
            return None
        reader.deadline_s = deadline_s
        reader.failed = partial(unloader._call, failed)
        return unloader

    def unload(self, chunk: Chunk, staged: StagedPayload, arrived: Callable[[Chunk], None]) -> None:
        ended = partial(self._ended, chunk, staged, arrived)
        read = Read(slot_offset(self.segment, staged.slot), HEAD_BYTES + staged.num_bytes, ended)
        self._thread.submit(partial(self._reader.read, read))

    def is_there(self, staged: StagedPayload) -> bool:
        """It was copied from there before it arrived."""
        return True

    def close(self) -> None:
        if self.freed is None:
            self.freed = self._thread.submit(self._free)

    async def _read_nonce(self) -> bytes | None:
        found: Future[bytes | None] = Future()
        read = Read(0, NONCE_BYTES, lambda view: found.set_result(None if view is None else bytes(view)))
        self._thread.submit(partial(self._reader.read, read))
        return await asyncio.shield(asyncio.wrap_future(found))

    # --- on the NIXL thread ---------------------------------------------------------------------------

    def _ended(
        self, chunk: Chunk, staged: StagedPayload, arrived: Callable[[Chunk], None], found: memoryview | None
    ) -> None:
        is_there = found is not None and int.from_bytes(found[:GENERATION_BYTES], "little") == staged.generation
        payload = found[HEAD_BYTES:] if found is not None and is_there else b""
        self._call(arrived, replace(chunk, payload=payload))

    def _call(self, function: Callable[..., None], argument: object) -> None:
        try:
            self._loop.call_soon_threadsafe(self._if_open, function, argument)
        except RuntimeError:  # the loop is closed: nobody is there to be told
            _log.debug("a READ has ended after its event loop")

    def _if_open(self, function: Callable[..., None], argument: object) -> None:
        if self.freed is None:
            function(argument)

    def _free(self) -> None:
        _give_back(self._thread, self._retired, self._reader)


def _give_back(thread: NixlThread, retired: Retired, reader: Reader) -> None:
    thread.remove(reader)
    retired.end(reader)


def _make(thread: NixlThread, retired: Retired, segment: RemoteSegment, deadline_s: float) -> Reader:
    num_bytes = reader_bytes(segment)
    if not retired.has_room(num_bytes):
        raise Unavailable(
            f"{num_bytes} bytes more might have to be retired, beyond handoff.max_retired_bytes, or too many agents "
            "whose READs failed are kept"
        )
    reader = Reader(segment, deadline_s=deadline_s, wake=thread.wake)
    retired.took(reader, num_bytes)
    thread.add(reader)
    return reader
