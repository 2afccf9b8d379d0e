"""How long decode leaves the cores to prefill, where both pools compute on the same ones.

A step for few answers takes about as much of the cores as one for many. So while prompts are on their way, to this
replica or to another one of these cores, a step that only goes on with answers waits a little, and then finds more of
them (engine/thread.py).
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

VARIABLE = "SHOAL_ON_THEIR_WAY_FILE"
"""Names, in the environment of replicas that share a machine's cores, the file by which they know of one another."""

YIELD_S, MAX_YIELD_S = 0.05, 0.2
"""Of one replica, and of as many as there may be: five tokens a second are as many as are read."""


def yield_s_of(num_replicas: int) -> float:
    """From the beginning of a step to that of the next one, of each: up to four make as many together as one would."""
    return min(MAX_YIELD_S, YIELD_S * num_replicas)


class OnTheirWay:
    """Whether prompts are, to any decode replica of these cores: a file that each one has locked while some are on
    their way to itself. A lock ends with its process, so that nobody waits for a dead one.

    Locks are those of open file descriptions, fcntl(2): unlike flock(2)'s, one can ask for them without taking one.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError where the file can't be opened."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._are_to_us = False

    @classmethod
    def of_this_process(cls) -> OnTheirWay | None:
        """By the file that the environment names, if it names one, and this system has such locks."""
        path = os.environ.get(VARIABLE)
        return cls(Path(path)) if path and hasattr(fcntl, "F_OFD_GETLK") else None

    def __call__(self, are_to_us: bool) -> bool:
        """Tell the others whether some are on their way to this replica; return whether they are to any."""
        try:
            if are_to_us != self._are_to_us:
                self._lock(fcntl.F_OFD_SETLK, fcntl.F_RDLCK if are_to_us else fcntl.F_UNLCK)
                self._are_to_us = are_to_us
            return are_to_us or self._lock(fcntl.F_OFD_GETLK, fcntl.F_WRLCK) != fcntl.F_UNLCK
        except OSError:  # the system has no lock left: no reason to end an engine
            return are_to_us

    def close(self) -> None:
        os.close(self._file)

    def _lock(self, command: int, kind: int) -> int:
        """What kind of lock is in the way of this one, if that is what is asked."""
        whole_file = struct.pack(_FLOCK, kind, os.SEEK_SET, 0, 0, 0)
        found: int = struct.unpack(_FLOCK, fcntl.fcntl(self._file, command, whole_file))[0]
        return found


_FLOCK = "hhqqi0q"
"""C's struct flock: kind, whence, start, length, owner."""
