"""Decode's end of a session with one prefill process: frames in, the desk's answers out."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial

from shoal.errors import HandoffError, LeaseLost, PeerGone, ProtocolViolation, ShoalError
from shoal.handoff.arrivals import Arrivals, LeaseFrame
from shoal.handoff.base import Channel, Unloader
from shoal.handoff.decode_side import HandoffDesk
from shoal.handoff.lease import Lease
from shoal.handoff.session import Identity, Session
from shoal.handoff.slots import check_place
from shoal.handoff.terms import Owner
from shoal.wire.handoff_messages import (
    Beat,
    Cancel,
    Carrier,
    Chunk,
    Claim,
    Draining,
    Failed,
    Frame,
    Hello,
    Refused,
    RemoteSegment,
    Seal,
    StagedPayload,
    StagingSegment,
    WireMode,
)

MAX_WAITING_FRAMES = 1024
"""Of a lease, behind one whose payload is being fetched: far more than there are slots."""

AttachLocal = Callable[[StagingSegment], Unloader | None]
AttachRemote = Callable[[RemoteSegment, Callable[[ShoalError], None]], Awaitable[Unloader | None]]


@dataclass(frozen=True, slots=True)
class Attach:
    """How decode finds the memory that prefill offers; ``None`` is given, and gives, what isn't possible or wanted.

    What ``remote`` found calls its second argument, on the event loop, when the memory can't be read any more.
    """

    local: AttachLocal | None = None
    remote: AttachRemote | None = None


_session_ids = itertools.count()


class DecodeSession(Session):
    """Serves one channel with the leases of ``desk``: ``await session.run()``.

    What is wrong with one lease ends that lease; only what makes no sense in any ends the session.
    """

    def __init__(self, channel: Channel, desk: HandoffDesk, identity: Identity, attach: Attach | None = None) -> None:
        super().__init__(channel, identity, ttl_s=desk.times.ttl_s, clock=desk.clock)
        self._desk = desk
        self._attach = attach or Attach()
        self._staging: Unloader | None = None
        self._arrivals = Arrivals(self._arrived)
        self._owner: Owner | None = None
        self._wire_mode = WireMode.KV

    @property
    def owner(self) -> Owner:
        """This session, as its leases know it. Raises PeerGone before the greeting."""
        if self._owner is None:
            raise PeerGone("the other end hasn't greeted yet")
        return self._owner

    def takes_grants(self, key: bytes) -> bool:
        """At the other end is the process that has this key, and it hasn't said that it's leaving."""
        if self._owner is None or self.peer is None or self.is_over or self.peer_is_draining:
            return False
        return bool(key) and secrets.compare_digest(self.peer.key, key)

    async def greet(self) -> None:
        await super().greet()
        key = b"" if self.peer is None else self.peer.key
        self._owner = Owner(next(_session_ids), self.peer_incarnation, self._wire_mode, key)
        self._desk.session_began(self._owner, self)

    async def _exchange(self, ours: Hello) -> Hello:
        """Prefill speaks first: our answer says whether we read from its memory, and what we want from there."""
        ours = replace(ours, has_nixl=self._attach.remote is not None)
        theirs = await self._answer(ours)
        if theirs.segment is not None and self._staging is None and ours.has_nixl and theirs.has_nixl:
            # Not as before, whatever comes of it: what comes twice is dropped.
            theirs = await self._answer(replace(ours, has_nixl=False))
        return theirs

    async def _answer(self, ours: Hello) -> Hello:
        try:
            theirs = await self._listen()
            self._staging = await self._find(theirs)
            if self._staging is not None:
                ours = ours.naming(self._staging.segment)
            shape = self._desk.shape
            self._wire_mode = shape.choose_wire_mode(ours.wire_modes, theirs.wire_modes, self._carrier)
            ours = replace(ours, wire_modes=(self._wire_mode,))
        finally:
            await self._say(ours)
        return theirs

    @property
    def _carrier(self) -> Carrier:
        return Carrier.INLINE if self._staging is None else self._staging.carrier

    async def _find(self, theirs: Hello) -> Unloader | None:
        if theirs.segment is not None and self._attach.local is not None:
            return self._attach.local(theirs.segment)
        if theirs.remote is None or self._attach.remote is None:
            return None
        found = await self._attach.remote(theirs.remote, self._end)
        if found is not None and self.is_over:
            found.close()
            return None
        return found

    def _obey(self, frame: Frame) -> None:
        match frame:
            case Beat():
                self._desk.table.renew(self.owner, frame.lease_ids)
            case Claim():
                self._claim(frame)
            case Chunk() if frame.staged is not None:
                self._fetch(frame, frame.staged)
            case Chunk() | Seal() | Failed():
                self._take(frame)
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
            accepted = self._desk.claim(claim.lease_id, self.owner, plan_hashes)
            self.post(accepted, partial(self._desk.answered, claim.lease_id))
        except LeaseLost as error:
            self.post(Refused(claim.lease_id, error.message))

    def _take(self, frame: LeaseFrame) -> None:
        """Behind what is being fetched for its lease; of that there is no more than a lease may bring."""
        num_waiting = self._arrivals.num_waiting(frame.lease_id)
        if num_waiting:
            lease = self._desk.table.receiving(frame.lease_id, self.owner)
            if lease is None:
                self._late(frame)
                return
            num_bytes = self._arrivals.num_bytes(lease.lease_id) + (frame.num_bytes if isinstance(frame, Chunk) else 0)
            if num_bytes > lease.terms.credit_bytes or num_waiting >= MAX_WAITING_FRAMES:
                self.num_dropped += 1
                lease.cancel(ProtocolViolation(f"{num_waiting} frames of {num_bytes} bytes wait for what is fetched"))
                return
        self._arrivals.add(frame)

    def _fetch(self, chunk: Chunk, staged: StagedPayload) -> None:
        """Have its payload read, unless nobody wants it: what came before may be in no slot any more."""
        lease = self._desk.table.receiving(chunk.lease_id, self.owner)
        if lease is None:
            self._late(chunk)
        elif lease.has(chunk.seq):
            self.num_dropped += 1
        elif not self._arrivals.expects(chunk.lease_id, chunk.seq):
            try:
                staging = self._check_fetch(lease, chunk, staged)
            except ProtocolViolation as error:
                lease.cancel(error)
            else:
                staging.unload(chunk, staged, self._arrivals.expect(chunk))

    def _check_fetch(self, lease: Lease, chunk: Chunk, staged: StagedPayload) -> Unloader:
        if self._staging is None:
            raise ProtocolViolation(f"chunk {chunk.seq} is in a staging slot, but this session has none")
        check_place(self._staging.segment, staged)
        max_bytes = lease.terms.credit_bytes
        if self._arrivals.num_bytes(chunk.lease_id) + chunk.num_bytes > max_bytes:
            raise ProtocolViolation(f"chunk {chunk.seq} goes beyond the credit of {max_bytes} bytes")
        return self._staging

    def _arrived(self, frame: LeaseFrame) -> None:
        lease = self._desk.table.receiving(frame.lease_id, self.owner)
        if lease is None:
            self._late(frame)
            return
        try:
            match frame:
                case Chunk():
                    self._desk.receive(lease, frame, None if frame.staged is None else self._staging)
                case Seal():
                    self._desk.seal(lease, frame)
                case Failed():
                    raise HandoffError(f"prefill gave the prompt up: {frame.reason}")
        except HandoffError as error:
            lease.cancel(error)

    def _late(self, frame: LeaseFrame) -> None:
        """Drop it. Whoever still works for a lease that has ended didn't hear Cancel, so say it again; also to who has
        given up, if its memory is lent until then."""
        self.num_dropped += 1
        if not isinstance(frame, Failed) or self._staging is not None:
            self.post(Cancel(frame.lease_id, "the lease has ended"))
