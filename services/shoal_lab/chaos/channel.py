"""A hand-off's channel whose frames meet the faults that the switchboard names, on both ways.

Here, at the seam between frames and gRPC, a bit can flip and a frame can come twice: below, TCP and TLS would hide it.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterable

from shoal.handoff.base import Channel
from shoal.handoff.channels.faults import Corrupt, Delay, Drop, Duplicate, Fault, Truncate
from shoal.wire.handoff_messages import Chunk, Envelope, Frame
from shoal_lab.chaos.switchboard import FrameFault, Switchboard

_RULES: dict[FrameFault, type[Fault]] = {
    FrameFault.DROP: Drop,
    FrameFault.DUPLICATE: Duplicate,
    FrameFault.REORDER: Delay,
    FrameFault.TRUNCATE: Truncate,
    FrameFault.CORRUPT: Corrupt,
}
_NEED_PAYLOAD = frozenset({FrameFault.TRUNCATE, FrameFault.CORRUPT})


class FaultyChannel:
    """``channel``, and what happens to its frames."""

    def __init__(self, channel: Channel, switchboard: Switchboard, chance: random.Random) -> None:
        self._channel = channel
        self._sent = _Rules(switchboard, chance)
        self._received = _Rules(switchboard, chance)
        self._arrived: deque[Envelope] = deque()

    async def send(self, envelope: Envelope) -> None:
        for delivered in self._sent(envelope):
            await self._channel.send(delivered)

    async def receive(self) -> Envelope:
        while not self._arrived:
            self._arrived.extend(self._received(await self._channel.receive()))
        return self._arrived.popleft()

    async def close(self) -> None:
        await self._channel.close()


class _Rules:
    """One of each kind, always: what one of them holds comes out after the fault is over, too."""

    def __init__(self, switchboard: Switchboard, chance: random.Random) -> None:
        self._switchboard = switchboard
        self._chance = chance
        self._rules = [self._rule(fault) for fault in _RULES]

    def __call__(self, envelope: Envelope) -> Iterable[Envelope]:
        envelopes = [envelope]
        for rule in self._rules:
            envelopes = [delivered for one in envelopes for delivered in rule(one)]
        return envelopes

    def _rule(self, fault: FrameFault) -> Fault:
        return _RULES[fault](lambda frame: self._strikes(fault, frame), times=sys.maxsize)

    def _strikes(self, fault: FrameFault, frame: Frame) -> bool:
        if self._switchboard.frame_fault is not fault or (fault in _NEED_PAYLOAD and not isinstance(frame, Chunk)):
            return False
        return self._chance.random() < self._switchboard.rate
