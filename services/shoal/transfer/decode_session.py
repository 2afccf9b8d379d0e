"""Decode's end of a session with one prefill process: frames in, the desk's answers out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

from shoal.errors import HandoffError, LeaseLost, PeerGone, ProtocolViolation, ShoalError
from shoal.messages import (
    Beat,
    Cancel,
    Chunk,
    Claim,
    Drained,
    Draining,
    Failed,
    Frame,
    Hello,
    Refused,
    Seal,
    StagingSegment,
)
from shoal.transfer.base import Channel, Unloader
from shoal.transfer.decode_side import HandoffDesk
from shoal.transfer.session import Identity, Session
from shoal.transfer.terms import Owner

Attach = Callable[[StagingSegment], Unloader | None]
"""Finds the memory that prefill offers, if that's possible and wanted here."""

_session_ids = itertools.count()


class DecodeSession(Session):
    """Serves one channel with the leases of ``desk``: ``await session.run()``.

    What is wrong with one lease ends that lease; only what makes no sense in any ends the session.
    """

    def __init__(self, channel: Channel, desk: HandoffDesk, identity: Identity, attach: Attach | None = None) -> None:
        super().__init__(channel, identity, ttl_s=desk.times.ttl_s, clock=desk.clock)
        self._desk = desk
        self._attach = attach
        self._staging: Unloader | None = None
        self._owner: Owner | None = None

    @property
    def owner(self) -> Owner:
        """This session, as its leases know it. Raises PeerGone before the greeting."""
        if self._owner is None:
            raise PeerGone("the other end hasn't greeted yet")
        return self._owner

    async def greet(self) -> None:
        await super().greet()
        self._owner = Owner(next(_session_ids), self.peer_incarnation)
        self._desk.session_began(self._owner, self)

    async def _exchange(self, ours: Hello) -> Hello:
        """Prefill speaks first: our answer says whether we read from its memory."""
        try:
            theirs = await self._listen()
            if theirs.segment is not None and self._attach is not None:
                self._staging = self._attach(theirs.segment)
        finally:
            await self._say(ours if self._staging is None else replace(ours, segment=self._staging.segment))
        return theirs

    def _obey(self, frame: Frame) -> None:
        match frame:
            case Beat():
                self._desk.table.renew(self.owner)
            case Claim():
                self._claim(frame)
            case Chunk() | Seal() | Failed():
                self._about_lease(frame)
            case Drained():
                self._desk.table.writer_stopped(frame.lease_id, self.owner.incarnation)
            case Draining():
                self.peer_is_draining = True
            case _:
                raise ProtocolViolation(f"prefill sent {type(frame).__name__}, which only decode may")

    def _ended(self, error: ShoalError) -> None:
        if self._staging is not None:
            self._staging.close()
        if self._owner is not None:
            self._desk.session_ended(self._owner, error)

    def _claim(self, claim: Claim) -> None:
        plan_hashes = () if self.peer is None else self.peer.plan_hashes
        try:
            self.post(self._desk.claim(claim.lease_id, self.owner, plan_hashes))
        except LeaseLost as error:
            self.post(Refused(claim.lease_id, error.message))

    def _about_lease(self, frame: Chunk | Seal | Failed) -> None:
        lease = self._desk.table.receiving(frame.lease_id, self.owner)
        if lease is None:
            self._late(frame)
            return
        try:
            match frame:
                case Chunk():
                    # What came before may be in no slot any more.
                    self._desk.receive(lease, frame if lease.has(frame.seq) else self._unload(frame))
                case Seal():
                    self._desk.seal(lease, frame)
                case Failed():
                    raise HandoffError(f"prefill gave the prompt up: {frame.reason}")
        except HandoffError as error:
            lease.cancel(error)

    def _unload(self, chunk: Chunk) -> Chunk:
        """Here, at once: between two frames nobody reads a slot, so that prefill may have them back with the lease."""
        if chunk.staged is None:
            return chunk
        if self._staging is None:
            raise ProtocolViolation(f"chunk {chunk.seq} is in a staging slot, but this session has none")
        return self._staging.unload(chunk)

    def _late(self, frame: Chunk | Seal | Failed) -> None:
        """Drop it. Whoever still works for a lease that has ended didn't hear Cancel, so say it again."""
        self.num_dropped += 1
        if not isinstance(frame, Failed):
            self.post(Cancel(frame.lease_id, "the lease has ended"))
