"""What decode replicas that compute on the same cores know of one another: whether prompts are on their way to any.

A file is what they know it by: each has it locked while some are on their way to itself. A lock ends with its process,
so that nobody waits for a dead one. They are those of open file descriptions, fcntl(2): unlike flock(2)'s, one can ask
for them without taking one.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
from pathlib import Path

VARIABLE = "SHOAL_NEIGHBOURS_FILE"
"""Names the file, in the environment of all that a private cluster starts."""

_FLOCK = "hhqqi0q"
"""C's struct flock: kind, whence, start, length, owner."""
_GETLK, _SETLK = 36, 37
"""Linux's F_OFD_GETLK and F_OFD_SETLK, by number: a Python that was built for old systems has no names for them."""
_log = logging.getLogger(__name__)


class Neighbours:
    """Of one replica: ``are_on_their_way`` is for its engine's thread alone."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where the file can't be opened."""
        self._file = path.open("a+b", buffering=0)
        self._are_to_us = False

    @classmethod
    def of_this_process(cls) -> Neighbours | None:
        """``None`` where the environment names no file, or one that can't be opened: it can do without."""
        path = os.environ.get(VARIABLE)
        try:
            return cls(Path(path)) if path else None
        except OSError as error:
            _log.warning("decode replicas of these cores won't know of one another: %s", error)
            return None

    def are_on_their_way(self, to_us: bool) -> bool:
        """Tell the others whether prompts are, to this replica; return whether they are to any."""
        try:
            if to_us != self._are_to_us:
                self._lock(_SETLK, fcntl.F_RDLCK if to_us else fcntl.F_UNLCK)
                self._are_to_us = to_us
            return to_us or self._lock(_GETLK, fcntl.F_WRLCK) != fcntl.F_UNLCK
        except OSError:  # the system has no lock left: no reason to end an engine
            return to_us

    def close(self) -> None:
        """Nothing is on its way here any more. Twice is a no-op."""
        self._file.close()

    def _lock(self, command: int, kind: int) -> int:
        """What kind of lock is in the way of this one, if that is what is asked."""
        whole_file = struct.pack(_FLOCK, kind, os.SEEK_SET, 0, 0, 0)
        found: int = struct.unpack(_FLOCK, fcntl.fcntl(self._file, command, whole_file))[0]
        return found
