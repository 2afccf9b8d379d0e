"""Payload in shared memory, for two processes on one host.

The segment (handoff/slots.py) is a file in /dev/shm. Its name exists while the two greet, so what a crash can leave
behind is a file whose owner is dead: its lock is gone, and ``reap`` removes it. Decode maps it read-only.
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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from shoal.backends.cpu.copying import Copier
from shoal.handoff.slots import GENERATION_BYTES, HEAD_BYTES, SlotLoader, choose_slots, segment_bytes, slot_offset
from shoal.wire.frames import NONCE_BYTES
from shoal.wire.handoff_messages import Carrier, Chunk, StagedPayload, StagingSegment

FOLDER = Path("/dev/shm")  # noqa: S108 - names there are unguessable, and exclusive when made
NAME = re.compile(r"shoal-[0-9a-f]{32}")
_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_log = logging.getLogger(__name__)


class ShmLoader(SlotLoader):
    """Prefill's end: the segment of one session. Made by ``create``."""

    carrier = Carrier.SHM

    def __init__(self, path: Path, memory: mmap.mmap, segment: StagingSegment, copier: Copier) -> None:
        super().__init__(memory, segment, copier)
        self.segment = segment
        self._path = path

    @classmethod
    def create(cls, slot_bytes: int, max_bytes: int, folder: Path = FOLDER, copier: Copier | None = None) -> ShmLoader:
        """A segment of at most ``max_bytes``, and of half the room that is left; its slots may be smaller than wanted.
        Raises OSError if none can be made."""
        room = os.statvfs(folder)
        num_slots, slot_bytes = choose_slots(min(max_bytes, room.f_bavail * room.f_frsize // 2), slot_bytes)
        if num_slots < 1:
            raise OSError(errno.ENOSPC, "no room for a staging slot", str(folder))
        path, file = _new_file(folder)
        segment = StagingSegment(path.name, num_slots, slot_bytes, secrets.token_bytes(NONCE_BYTES))
        try:
            # Now, where it's an error that we can answer: a page that is missing later kills the process.
            os.posix_fallocate(file, 0, segment_bytes(segment))
            memory = mmap.mmap(file, segment_bytes(segment), mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(file)
        memory[:NONCE_BYTES] = segment.nonce
        return cls(path, memory, segment, copier or Copier())

    def hide(self) -> None:
        """Remove the name: whoever was to map the segment has done so. Twice is a no-op."""
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        self.hide()
        self._memory.close()


class ShmUnloader:
    """Decode's end: the segment of one session, mapped read-only. Made by ``attach``."""

    carrier = Carrier.SHM

    def __init__(self, memory: mmap.mmap, segment: StagingSegment) -> None:
        self.segment = segment
        self._memory: mmap.mmap | None = memory

    @classmethod
    def attach(cls, segment: StagingSegment, folder: Path = FOLDER) -> ShmUnloader | None:
        """Map ``segment``; ``None`` if it isn't here (another host), isn't ours, or isn't what the peer says it is."""
        try:
            memory = _map(segment, folder)
        except (OSError, ValueError) as error:  # ValueError: it was cut just now
            _log.debug("a staging segment that was offered can't be mapped: %s", error)
            return None
        return cls(memory, segment)

    def unload(self, chunk: Chunk, staged: StagedPayload, arrived: Callable[[Chunk], None]) -> None:
        """At once: the slot itself, where it stays until its credit."""
        payload = memoryview(b"")
        if self._memory is not None and self.is_there(staged):
            start = slot_offset(self.segment, staged.slot) + HEAD_BYTES
            payload = memoryview(self._memory)[start : start + staged.num_bytes]
        arrived(replace(chunk, payload=payload))

    def is_there(self, staged: StagedPayload) -> bool:
        memory = self._memory
        # To read beyond the end of a file that was cut would kill the process.
        if memory is None or memory.size() < segment_bytes(self.segment):
            return False
        start = slot_offset(self.segment, staged.slot)
        return int.from_bytes(memory[start : start + GENERATION_BYTES], "little") == staged.generation

    def close(self) -> None:
        """Unmapped when the last copy from it has ended."""
        self._memory = None


def _new_file(folder: Path) -> tuple[Path, int]:
    """A file that is locked, and its descriptor. The mapping keeps it open: while that lives, nobody reaps the file."""
    while True:
        path = folder / f"shoal-{secrets.token_hex(16)}"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN, 0o600)
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file).st_nlink:
                return path, file
        # Another process started just now, and reaps what isn't locked yet.
        os.close(file)
        path.unlink(missing_ok=True)


def reap(folder: Path = FOLDER) -> int:
    """Remove segments whose owner has died before anybody could; returns how many."""
    paths = tuple(folder.iterdir()) if folder.is_dir() else ()
    return sum(_reap(path) for path in paths if NAME.fullmatch(path.name))


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
    if not NAME.fullmatch(segment.name):
        raise OSError(errno.EINVAL, "not a segment's name", segment.name)
    file = os.open(folder / segment.name, os.O_RDONLY | _OPEN)
    try:
        found = os.fstat(file)
        is_private = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
        if not is_private or found.st_size != segment_bytes(segment):
            raise OSError(errno.EPERM, "not the file that was announced", segment.name)
        memory = mmap.mmap(file, found.st_size, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ)
    finally:
        os.close(file)
    if not hmac.compare_digest(memory[:NONCE_BYTES], segment.nonce):
        memory.close()
        raise OSError(errno.EPERM, "another segment of this name", segment.name)
    return memory
