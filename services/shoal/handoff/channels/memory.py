"""Two ends of a channel in one process. What goes in at one end comes out at the other, as the rules have it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from shoal.errors import PeerGone
from shoal.wire.handoff_messages import Envelope

Rule = Callable[[Envelope], Iterable[Envelope]]
"""Says what arrives when an envelope is sent: nothing, itself, several. PeerGone breaks the channel at that frame."""


def deliver(envelope: Envelope) -> Iterable[Envelope]:
    """The rule of a channel without faults."""
    return (envelope,)


class MemoryChannel:
    """One end; made by ``memory_pair``. Nothing is copied, and the hand-off's byte credit bounds what is queued."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._arrived: asyncio.Queue[Envelope | None] = asyncio.Queue()
        self._is_closed = False
        self._other: MemoryChannel | None = None

    def join(self, other: MemoryChannel) -> None:
        self._other, other._other = other, self

    async def send(self, envelope: Envelope) -> None:
        if self._is_closed or self._other is None:
            raise PeerGone("the channel is closed")
        try:
            for delivered in self._rule(envelope):
                self._other._arrived.put_nowait(delivered)
        except PeerGone:
            await self.close()
            raise

    async def receive(self) -> Envelope:
        envelope = await self._arrived.get()
        if envelope is None:
            self._arrived.put_nowait(None)  # whoever asks again is told again
            raise PeerGone("the channel is closed")
        return envelope

    async def close(self) -> None:
        for end in (self, self._other):
            if end is not None and not end._is_closed:
                end._is_closed = True
                end._arrived.put_nowait(None)


def memory_pair(*, prefill_sends: Rule = deliver, decode_sends: Rule = deliver) -> tuple[MemoryChannel, MemoryChannel]:
    """A joined pair: prefill's end, decode's end. Each rule decides about what its side sends."""
    prefill, decode = MemoryChannel(prefill_sends), MemoryChannel(decode_sends)
    prefill.join(decode)
    return prefill, decode
