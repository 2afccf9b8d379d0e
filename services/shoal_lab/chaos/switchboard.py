"""A page of memory that the chaos process writes and all replicas read: what is to go wrong in them, from now on.

It's a file that is mapped, so that a replica asks at each frame, and at each look at its clock, for nothing. Its name
is in the environment of the replicas, which only whoever starts them can set.
"""

from __future__ import annotations

import enum
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "SHOAL_CHAOS_SWITCHBOARD"

_CLOCK, _RATE, _FAULT, _DISK = range(0, 32, 8)
_SIZE = 32


class FrameFault(enum.IntEnum):
    """What may happen to a frame of a hand-off (handoff/channels/faults.py)."""

    NONE = 0
    DROP = 1
    DUPLICATE = 2
    REORDER = 3
    TRUNCATE = 4
    CORRUPT = 5


class Switchboard:
    """Each value is eight aligned bytes, so that none is read half written."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory

    @classmethod
    def of_this_process(cls) -> Switchboard:
        """The one that the environment names, to read only. Raises KeyError or OSError if there is none."""
        with Path(os.environ[VARIABLE]).open("rb") as file:
            return cls(mmap.mmap(file.fileno(), _SIZE, access=mmap.ACCESS_READ))

    @property
    def clock_offset_s(self) -> float:
        """By how much replicas' wall clocks are wrong."""
        return self._number(_CLOCK)

    @clock_offset_s.setter
    def clock_offset_s(self, seconds: float) -> None:
        self._set(_CLOCK, seconds)

    @property
    def disk_is_full(self) -> bool:
        """Whether a replica that starts may write files. (Those that run are told otherwise.)"""
        return bool(self._number(_DISK))

    @disk_is_full.setter
    def disk_is_full(self, is_full: bool) -> None:
        self._set(_DISK, float(is_full))

    @property
    def rate(self) -> float:
        """Of how many frames the fault strikes one: 0.1 is every tenth."""
        return self._number(_RATE)

    @property
    def frame_fault(self) -> FrameFault:
        return FrameFault(int(self._number(_FAULT)))

    def set_frame_fault(self, fault: FrameFault, rate: float) -> None:
        self._set(_FAULT, float(FrameFault.NONE))
        self._set(_RATE, rate)
        self._set(_FAULT, float(fault))

    def _number(self, offset: int) -> float:
        value: float = struct.unpack_from("=d", self._memory, offset)[0]
        return value

    def _set(self, offset: int, value: float) -> None:
        struct.pack_into("=d", self._memory, offset, value)


@contextmanager
def switching() -> Iterator[Switchboard]:
    """A switchboard for all processes that are started within the block."""
    with tempfile.NamedTemporaryFile(prefix="shoal-chaos-") as file:
        file.truncate(_SIZE)
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = file.name
        try:
            with mmap.mmap(file.fileno(), _SIZE) as memory:
                yield Switchboard(memory)
        finally:
            if before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = before
