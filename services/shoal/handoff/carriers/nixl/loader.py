"""Prefill's slots for one session, registered with an agent of their own."""

from __future__ import annotations

import logging
import secrets
import time
from concurrent.futures import Future

from shoal.backends.cpu.copying import Copier
from shoal.errors import Unavailable
from shoal.handoff.carriers.nixl.agent import Agent, Registered, new_memory
from shoal.handoff.carriers.nixl.thread import NixlThread, poll_after
from shoal.handoff.frames import Piece
from shoal.handoff.slots import SlotLoader, choose_slots, segment_bytes
from shoal.wire.frames import NONCE_BYTES
from shoal.wire.handoff_messages import Carrier, Chunk, RemoteSegment

_MIN_POLL_S = 200e-6
"""Far less than a slot takes over TCP, and little work for the processor where decode needs no help."""
LINGER_S = 10.0
"""How long decode may take to end what it was reading of a lease that it gave up. Longer than its deadline for a READ,
which counts from where that begins, and it may have to wait for a buffer: then decode ends the session."""
_log = logging.getLogger(__name__)


class NixlLoader(SlotLoader):
    """Made by ``open``. While decode may be reading, the agent must be polled: over TCP, its end sends the bytes."""

    carrier = Carrier.NIXL

    def __init__(
        self,
        thread: NixlThread,
        agent: Agent,
        registered: Registered,
        segment: RemoteSegment,
        copier: Copier,
        linger_s: float,
    ) -> None:
        super().__init__(registered.memory, segment, copier)
        self.segment = segment
        self._thread = thread
        self._agent: Agent | None = agent
        self._registered = registered
        self._is_greeting = True
        self._touched_s = time.monotonic()
        self._linger_s = linger_s
        self._lingers_until_s = 0.0
        self.freed: Future[None] | None = None
        thread.add(self)

    @classmethod
    async def open(
        cls,
        thread: NixlThread,
        slot_bytes: int,
        max_bytes: int,
        copier: Copier | None,
        linger_s: float,
    ) -> NixlLoader:
        """Slots that take at most ``max_bytes``. Raises Unavailable if there is no agent, OSError without memory."""
        return await thread.call(
            lambda: _make(thread, slot_bytes, max_bytes, copier or Copier(), linger_s), undo=cls.close
        )

    def load(self, piece: Piece) -> Chunk:
        loaded = super().load(piece)
        self._touched_s = time.monotonic()
        self._thread.wake()
        return loaded

    def ended(self, lease_id: bytes) -> None:
        num_lent = self.num_lent
        super().ended(lease_id)
        if self.num_lent < num_lent:  # decode gave the lease up, maybe in the midst of reading: that has to end, too
            self._lingers_until_s = time.monotonic() + self._linger_s
            self._thread.wake()

    def hide(self) -> None:
        """The greeting is over. Twice is a no-op."""
        self._is_greeting = False

    def close(self) -> None:
        self.hide()
        if self.freed is None:
            self.freed = self._thread.submit(self._free)

    def poll(self, now_s: float) -> float | None:
        if self._agent is None or not (self._is_greeting or self.num_lent or now_s < self._lingers_until_s):
            return None
        try:
            self._agent.progress()
        except Unavailable as error:
            # Decode will notice, and end the session.
            _log.warning("decode can't read from here any more: %s", error.message)
            return None
        return poll_after(max(0.0, now_s - self._touched_s), min_s=_MIN_POLL_S)

    def _free(self) -> None:
        """The agent before the memory: whoever still reads gets an error, and not what comes there next."""
        self._thread.remove(self)
        agent, self._agent = self._agent, None
        if agent is not None:
            try:
                agent.deregister(self._registered)
            except Unavailable as error:
                _log.debug("given back to NIXL: %s", error.message)
        del agent
        self._memory.close()


def _make(thread: NixlThread, slot_bytes: int, max_bytes: int, copier: Copier, linger_s: float) -> NixlLoader:
    num_slots, slot_bytes = choose_slots(max_bytes, slot_bytes)
    if num_slots < 1:
        raise Unavailable(f"no staging slot of {slot_bytes} bytes fits {max_bytes} bytes")
    agent = Agent()
    shape = RemoteSegment(b"", 0, num_slots, slot_bytes, secrets.token_bytes(NONCE_BYTES))
    memory = new_memory(segment_bytes(shape))
    memory[:NONCE_BYTES] = shape.nonce
    registered = agent.register(memory)
    segment = RemoteSegment(agent.metadata, registered.address, num_slots, slot_bytes, shape.nonce)
    return NixlLoader(thread, agent, registered, segment, copier, linger_s)
