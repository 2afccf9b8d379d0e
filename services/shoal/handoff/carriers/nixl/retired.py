"""Buffers that NIXL may still be writing into, though their session is over."""

from __future__ import annotations

import logging
from collections.abc import Callable

from shoal.handoff.carriers.nixl.reader import Reader

_MAX_KEPT = 32
"""Agents whose READs failed, which can't be ended. With more of them this process reads by NIXL no more."""
_log = logging.getLogger(__name__)
_abandoned: list[Reader] = []
"""Of processes that end: freed by nobody, since NIXL might be writing."""


class Retired:
    """What is in use may have to be retired, so both together never exceed ``max_bytes``. Lives on the NIXL thread.

    ``told`` gets the bytes that are retired, whenever they change.
    """

    def __init__(self, max_bytes: int, told: Callable[[int], None]) -> None:
        self._max_bytes = max_bytes
        self._told = told
        self._taken: dict[Reader, int] = {}
        self._retired: list[Reader] = []
        self._num_kept = 0

    @property
    def num_bytes(self) -> int:
        return sum(reader.reading_bytes for reader in self._retired)

    @property
    def num_readers(self) -> int:
        return len(self._taken)

    def has_room(self, num_bytes: int) -> bool:
        taken = sum(num for reader, num in self._taken.items() if reader not in self._retired)
        return self._num_kept < _MAX_KEPT and taken + self.num_bytes + num_bytes <= self._max_bytes

    def took(self, reader: Reader, num_bytes: int) -> None:
        self._taken[reader] = num_bytes

    def end(self, reader: Reader) -> None:
        """Close it, or as much of it as NIXL has let go. Twice is a no-op."""
        if reader not in self._taken or reader in self._retired:
            return
        reader.close()
        if not reader.is_reading:
            self._gone(reader)
            return
        self._retired.append(reader)
        _log.warning("%d bytes are retired: a READ of a session that is over isn't", reader.reading_bytes)
        self._told(self.num_bytes)

    def poll(self, now_s: float) -> float | None:
        """Whether a READ has ended after all."""
        before = self.num_bytes
        waits_s = [reader.poll(now_s) for reader in self._retired]
        for reader in [reader for reader in self._retired if not reader.is_reading]:
            self._retired.remove(reader)
            self._gone(reader)
        if self.num_bytes != before:
            self._told(self.num_bytes)
        return min((wait_s for wait_s in waits_s if wait_s is not None), default=None)

    def abandon(self) -> None:
        """The process ends, or might as well: keep what NIXL has, for as long as there is memory."""
        _abandoned.extend(self._retired)

    def _gone(self, reader: Reader) -> None:
        del self._taken[reader]
        if reader.is_broken:
            self._num_kept += 1
            _log.warning("an agent whose READ failed is kept: %d of at most %d", self._num_kept, _MAX_KEPT)
