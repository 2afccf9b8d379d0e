"""Faults for a channel that only tests want: one that breaks it, and all others at once."""

from __future__ import annotations

import random
from collections.abc import Iterable

from shoal.errors import PeerGone
from shoal.handoff.channels.faults import Fault, flip_bit
from shoal.wire.handoff_messages import Envelope


class Reset(Fault):
    """Breaks the channel instead of delivering it."""

    def strike(self, envelope: Envelope) -> Iterable[Envelope]:
        raise PeerGone("the channel was reset")


class Storm:
    """Every fault but a reset, each with ``rate``, as ``seed`` has it."""

    def __init__(self, seed: int, rate: float) -> None:
        self._random = random.Random(seed)
        self._rate = rate
        self._held: list[Envelope] = []

    def __call__(self, envelope: Envelope) -> Iterable[Envelope]:
        late, self._held = self._held, []
        if self._happens():
            return late
        if self._happens():
            self._held.append(envelope)
            return late
        if self._happens():
            envelope = flip_bit(envelope, self._random.getrandbits(16))
        return (*late, envelope, envelope) if self._happens() else (envelope, *late)

    def _happens(self) -> bool:
        return self._random.random() < self._rate
