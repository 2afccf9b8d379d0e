"""Payload in shared memory, for two processes on one host.

::

    segment    nonce │ slot 0 │ slot 1 │ …        a file in /dev/shm; every part begins on a page
    slot       generation │ payload

    prefill  creates the segment ─> Hello                decode  maps it, read-only ─> Hello
             removes its name                                    (or not: then all payload travels inline)
             writes a free slot ─> Chunk                         copies it, and only then verifies ─> Credit
             the slot is free again

Prefill owns the memory, decode never writes. A slot is lent to one chunk until its Credit, or until decode ends the
lease (Committed, Cancel), since it reads nothing for a lease that has ended. The name exists while the two greet, so
what a crash can leave behind is a file whose owner is dead: its lock is gone, and ``reap`` removes it.
"""

from __future__ import annotations

import errno
import fcntl
import hmac
import logging
import mmap
import os
import re
import secrets
import stat
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shoal.errors import InternalError, ProtocolViolation
from shoal.messages import Chunk, StagedPayload, StagingSegment
from shoal.rpc.frames import MAX_SLOTS, NONCE_BYTES
from shoal.transfer.staging import StagingSlot, StagingSlots

FOLDER = Path("/dev/shm")  # noqa: S108 - names there are unguessable, and exclusive when made
_NAME = re.compile(r"shoal-[0-9a-f]{32}")
_GENERATION_BYTES = 8
_SLOT_HEAD_BYTES = 64
"""Before the payload: a cache line, most of it empty."""
_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_log = logging.getLogger(__name__)


class ShmLoader:
    """Prefill's end: the segment of one session. Made by ``create``."""

    def __init__(self, path: Path, memory: mmap.mmap, segment: StagingSegment) -> None:
        self.segment = segment
        self._path = path
        self._memory = memory
        num_bytes = segment.num_slots * segment.slot_bytes
        self._slots = StagingSlots(segment.num_slots, segment.slot_bytes, max_retired_bytes=num_bytes)
        self._lent: dict[bytes, dict[int, StagingSlot]] = {}

    @classmethod
    def create(cls, slot_bytes: int, max_bytes: int, folder: Path = FOLDER) -> ShmLoader:
        """A segment of at most ``max_bytes``, and of half the room that is left. Raises OSError if none can be made."""
        room = os.statvfs(folder)
        max_bytes = min(max_bytes, room.f_bavail * room.f_frsize // 2) - mmap.PAGESIZE
        num_slots = min(MAX_SLOTS, max_bytes // _stride(slot_bytes))
        if num_slots < 1:
            raise OSError(errno.ENOSPC, "no room for a staging slot", str(folder))
        name = f"shoal-{secrets.token_hex(16)}"
        segment = StagingSegment(name, num_slots, slot_bytes, secrets.token_bytes(NONCE_BYTES))
        path = folder / name
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN, 0o600)
        try:
            # Held by the mapping, which keeps the file open: while it lives, nobody reaps the segment.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Now, where it's an error that we can answer: a page that is missing later kills the process.
            os.posix_fallocate(file, 0, _num_bytes(segment))
            memory = mmap.mmap(file, _num_bytes(segment), mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(file)
        memory[:NONCE_BYTES] = segment.nonce
        return cls(path, memory, segment)

    @property
    def num_lent(self) -> int:
        return self._slots.num_lent

    def hide(self) -> None:
        """Remove the name: whoever was to map the segment has done so. Twice is a no-op."""
        self._path.unlink(missing_ok=True)

    @property
    def max_bytes(self) -> int:
        return self.segment.slot_bytes

    @property
    def has_room(self) -> bool:
        return self._slots.num_lent < self.segment.num_slots

    def load(self, chunk: Chunk) -> Chunk:
        """Copy the payload into a free slot."""
        slot = self._slots.take()
        if slot is None or len(chunk.payload) > slot.num_bytes:
            raise InternalError(f"{len(chunk.payload)} bytes don't fit the staging slots: ask has_room and max_bytes")
        self._lent.setdefault(chunk.lease_id, {})[chunk.seq] = slot
        start = _offset(self.segment, slot.index)
        # The generation first: who copies from the slot against the rules finds another one afterwards.
        self._memory[start : start + _GENERATION_BYTES] = slot.generation.to_bytes(_GENERATION_BYTES, "little")
        start += _SLOT_HEAD_BYTES
        self._memory[start : start + len(chunk.payload)] = chunk.payload
        return replace(chunk, payload=b"", staged=StagedPayload(slot.index, slot.generation, len(chunk.payload)))

    def credited(self, lease_id: bytes, seq: int) -> None:
        slot = self._lent.get(lease_id, {}).pop(seq, None)
        if slot is not None:
            self._slots.give_back(slot)

    def ended(self, lease_id: bytes) -> None:
        for slot in self._lent.pop(lease_id, {}).values():
            self._slots.give_back(slot)

    def close(self) -> None:
        self.hide()
        self._memory.close()


class ShmUnloader:
    """Decode's end: the segment of one session, mapped read-only. Made by ``attach``."""

    def __init__(self, memory: mmap.mmap, segment: StagingSegment) -> None:
        self.segment = segment
        self._memory = memory
        self._buffers: list[bytearray] = []

    @classmethod
    def attach(cls, segment: StagingSegment, folder: Path = FOLDER) -> ShmUnloader | None:
        """Map ``segment``; ``None`` if it isn't here (another host), isn't ours, or isn't what the peer says it is."""
        try:
            memory = _map(segment, folder)
        except (OSError, ValueError) as error:  # ValueError: it was cut just now
            _log.debug("a staging segment that was offered can't be mapped: %s", error)
            return None
        return cls(memory, segment)

    def unload(self, chunk: Chunk) -> Chunk:
        staged = chunk.staged
        if staged is None:
            return chunk
        if staged.slot >= self.segment.num_slots or staged.num_bytes > self.segment.slot_bytes:
            raise ProtocolViolation(
                f"{staged.num_bytes} bytes in staging slot {staged.slot}: there are {self.segment.num_slots} slots of "
                f"{self.segment.slot_bytes}"
            )
        return replace(chunk, payload=self._copy(staged))

    def close(self) -> None:
        self._memory.close()

    def _copy(self, staged: StagedPayload) -> bytes | memoryview:
        """A private copy, or nothing if the slot holds something else by now."""
        # To read beyond the end of a file that was cut would kill the process.
        if self._memory.closed or self._memory.size() < _num_bytes(self.segment):
            return b""
        start = _offset(self.segment, staged.slot)
        payload = self._buffer()[: staged.num_bytes]
        np.copyto(payload, np.frombuffer(self._memory, np.uint8, staged.num_bytes, start + _SLOT_HEAD_BYTES))
        generation = int.from_bytes(self._memory[start : start + _GENERATION_BYTES], "little")
        return memoryview(payload) if generation == staged.generation else b""  # type: ignore[arg-type]

    def _buffer(self) -> npt.NDArray[np.uint8]:
        """Private memory that comes back when nobody looks at it any more: fresh pages cost more than the copy."""
        buffer = self._buffers.pop() if self._buffers else bytearray(self.segment.slot_bytes)
        view = np.frombuffer(buffer, np.uint8)
        weakref.finalize(view, self._buffers.append, buffer).atexit = False
        return view


def reap(folder: Path = FOLDER) -> int:
    """Remove segments whose owner has died before anybody could; returns how many."""
    paths = tuple(folder.iterdir()) if folder.is_dir() else ()
    return sum(_reap(path) for path in paths if _NAME.fullmatch(path.name))


def _reap(path: Path) -> bool:
    try:
        file = os.open(path, os.O_RDONLY | _OPEN)
    except OSError:  # another user's, or gone
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except OSError:  # its owner lives, or it's gone
        return False
    finally:
        os.close(file)
    return True


def _map(segment: StagingSegment, folder: Path) -> mmap.mmap:
    """Raises OSError unless the file is there, is this user's alone, has this size, and begins with the nonce."""
    if not _NAME.fullmatch(segment.name):
        raise OSError(errno.EINVAL, "not a segment's name", segment.name)
    file = os.open(folder / segment.name, os.O_RDONLY | _OPEN)
    try:
        found = os.fstat(file)
        is_private = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
        if not is_private or found.st_size != _num_bytes(segment):
            raise OSError(errno.EPERM, "not the file that was announced", segment.name)
        memory = mmap.mmap(file, found.st_size, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ)
    finally:
        os.close(file)
    if not hmac.compare_digest(memory[:NONCE_BYTES], segment.nonce):
        memory.close()
        raise OSError(errno.EPERM, "another segment of this name", segment.name)
    return memory


def _stride(slot_bytes: int) -> int:
    """From one slot to the next."""
    return -(-(_SLOT_HEAD_BYTES + slot_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE


def _offset(segment: StagingSegment, slot: int) -> int:
    return mmap.PAGESIZE + slot * _stride(segment.slot_bytes)


def _num_bytes(segment: StagingSegment) -> int:
    return _offset(segment, segment.num_slots)
