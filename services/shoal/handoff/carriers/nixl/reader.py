"""Decode's READs of one remote segment, and the buffers that they fill. Lives on the NIXL thread."""

from __future__ import annotations

import logging
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.errors import PeerGone, ShoalError, Unavailable
from shoal.handoff.carriers.nixl.agent import Agent, Registered, new_memory
from shoal.handoff.carriers.nixl.thread import poll_after
from shoal.handoff.slots import HEAD_BYTES
from shoal.wire.handoff_messages import RemoteSegment

_NUM_BUFFERS = 4
"""One is read into, one is checked, one is copied into blocks, and one may be late."""
_RETIRED_POLL_S = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Read:
    """``num_bytes`` from ``offset`` of the segment. ``ended`` gets them, or ``None``, on the NIXL thread."""

    offset: int
    num_bytes: int
    ended: Callable[[memoryview | None], None]


@dataclass(slots=True, eq=False)
class _Reading:
    read: Read
    buffer: Registered
    handle: Any
    started_s: float
    is_overdue: bool = False


class Reader:
    """Raises Unavailable if the segment's agent can't be reached from here.

    ``failed`` is told, once, when a READ fails or isn't done within ``deadline_s``: there is no use in more.
    """

    failed: Callable[[ShoalError], None] | None = None

    def __init__(self, segment: RemoteSegment, *, deadline_s: float, wake: Callable[[], None]) -> None:
        self._segment = segment
        self.deadline_s = deadline_s
        self._wake = wake
        self._buffers: list[Registered] = []
        self._free: deque[Registered] = deque()
        self._pending: deque[Read] = deque()
        self._active: list[_Reading] = []
        self._is_closed = False
        self.is_broken = False
        """A READ has failed: the agent can't be ended safely, and is kept."""
        self._agent: Agent | None = Agent()
        self._peer = self._agent.add_peer(segment.agent)
        try:
            for _ in range(_NUM_BUFFERS):
                self._buffers.append(self._agent.register(new_memory(buffer_bytes(segment))))
        except BaseException:
            self.close()
            raise
        self._free.extend(self._buffers)

    @property
    def is_reading(self) -> bool:
        """READs are under way: their buffers belong to NIXL."""
        return bool(self._active)

    @property
    def reading_bytes(self) -> int:
        return len(self._active) * buffer_bytes(self._segment)

    def read(self, read: Read) -> None:
        """Begin ``read`` as soon as a buffer is free. A no-op once closed."""
        if not self._is_closed:
            self._pending.append(read)

    def poll(self, now_s: float) -> float | None:
        for reading in tuple(self._active):
            self._look_at(reading, now_s)
        while self._pending and self._free:
            self._begin(self._pending.popleft(), self._free.popleft())
        if not self._active:
            return None
        waited_s = time.monotonic() - self._active[0].started_s
        return poll_after(waited_s, max_s=_RETIRED_POLL_S) if self._is_closed else poll_after(waited_s)

    def close(self) -> None:
        """Begin no more; free what NIXL isn't writing into. ``poll`` frees the rest, as it ends."""
        self._is_closed = True
        self._pending.clear()
        busy = {id(reading.buffer) for reading in self._active}
        for buffer in tuple(self._buffers):
            if id(buffer) not in busy:
                self._free_buffer(buffer)
        self._end_if_done()

    # --- one READ -------------------------------------------------------------------------------------

    def _begin(self, read: Read, buffer: Registered) -> None:
        if self._agent is None:
            return
        try:
            handle = self._agent.read(self._peer, self._segment.address + read.offset, buffer, read.num_bytes)
        except Unavailable as error:
            self.is_broken = True
            self._release(buffer)
            self._fail(read, error)
            return
        reading = _Reading(read, buffer, handle, time.monotonic())
        self._active.append(reading)
        self._look_at(reading, reading.started_s)

    def _look_at(self, reading: _Reading, now_s: float) -> None:
        if self._agent is None:
            return
        error: Unavailable | None = None
        try:
            is_over = self._agent.is_done(reading.handle)
        except Unavailable as known:
            self.is_broken, is_over, error = True, True, known
        if is_over:
            self._ended(reading, error)
        elif not reading.is_overdue and now_s - reading.started_s > self.deadline_s:
            # Its buffer stays NIXL's: that nothing has come for so long doesn't say that nothing will.
            reading.is_overdue = True
            self._fail(reading.read, Unavailable(f"a READ has taken longer than {self.deadline_s:g} s"))

    def _ended(self, reading: _Reading, error: Unavailable | None) -> None:
        self._active.remove(reading)
        if self._agent is not None:
            _try(self._agent.release, reading.handle)
        if error is None and not reading.is_overdue and not self._is_closed:
            reading.read.ended(self._lend(reading.buffer, reading.read.num_bytes))
            return
        self._release(reading.buffer)
        if error is not None and not reading.is_overdue:
            self._fail(reading.read, error)

    def _fail(self, read: Read, error: Unavailable) -> None:
        failed, self.failed = self.failed, None
        if failed is not None:
            failed(PeerGone(f"prefill's memory can't be read any more: {error.message}"))
        read.ended(None)

    # --- buffers --------------------------------------------------------------------------------------

    def _lend(self, buffer: Registered, num_bytes: int) -> memoryview:
        """What was read; its buffer comes back when nobody looks at it any more."""
        view = np.frombuffer(buffer.memory, np.uint8, num_bytes)
        weakref.finalize(view, self._take_back, buffer).atexit = False
        return memoryview(view)  # type: ignore[arg-type]

    def _take_back(self, buffer: Registered) -> None:
        """On any thread."""
        self._free.append(buffer)
        if self._pending:
            self._wake()

    def _release(self, buffer: Registered) -> None:
        """NIXL writes into it no more, and nobody looks at it."""
        if self._is_closed:
            self._free_buffer(buffer)
            self._end_if_done()
        else:
            self._free.append(buffer)

    def _free_buffer(self, buffer: Registered) -> None:
        """Deregistered first. Its memory goes when nobody looks at it any more."""
        self._buffers.remove(buffer)
        if self._agent is not None:
            _try(self._agent.deregister, buffer)

    def _end_if_done(self) -> None:
        if not self._active and self._agent is not None:
            _try(self._agent.remove_peer, self._peer)
            if self.is_broken:
                self._agent.keep()
            self._agent = None
            self._free.clear()


def buffer_bytes(segment: RemoteSegment) -> int:
    return HEAD_BYTES + segment.slot_bytes


def reader_bytes(segment: RemoteSegment) -> int:
    """What all buffers of a segment's reader take."""
    return _NUM_BUFFERS * buffer_bytes(segment)


def _try(call: Callable[[Any], None], argument: object) -> None:
    """What is given back may be gone already, with the process at the other end."""
    try:
        call(argument)
    except Unavailable as error:
        _log.debug("given back to NIXL: %s", error.message)
