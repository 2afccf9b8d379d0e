"""Prefill's end of a session with one decode replica.

::

    async with session.claim(lease_id) as claim:        LeaseLost unless the lease is ours now
        …                                               compute claim.token_ids, stop if claim.cancelled is set
        await claim.send(…)                             waits for byte credit
        await claim.seal(…)                             returns once decode has committed
                                                        left otherwise: Failed, unless decode cancelled

No wait for an answer is longer than ``ttl_s``: whatever is lost on the way, blocks aren't held for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

from shoal.errors import Cancelled, LeaseLost, PeerGone, ProtocolViolation, ShoalError
from shoal.handoff.base import Channel, Clock, Loader, prompt_hash
from shoal.handoff.carriers.inline import InlineLoader
from shoal.handoff.frames import cut
from shoal.handoff.offer import Offer, Staging
from shoal.handoff.session import Identity, Session
from shoal.model.kv_rows import KvRows
from shoal.wire.handoff_messages import (
    Accepted,
    Beat,
    Cancel,
    Carrier,
    CarrierReason,
    Chunk,
    Claim,
    Committed,
    Credit,
    Draining,
    Failed,
    Frame,
    Granted,
    Hello,
    Nack,
    Refused,
    Seal,
    WireMode,
)


class PrefillSession(Session):
    """Speaks for many leases of one decode replica. Made by ``open``.

    Payload goes through the memory that ``staging`` makes, if decode finds it; else inline. ``granted`` is told of
    prompts that decode asks for.
    """

    def __init__(
        self,
        channel: Channel,
        identity: Identity,
        *,
        ttl_s: float,
        max_frame_bytes: int,
        clock: Clock | None = None,
        staging: Staging | None = None,
        granted: Callable[[Granted], None] = lambda granted: None,
    ) -> None:
        super().__init__(channel, identity, ttl_s=ttl_s, clock=clock or asyncio.get_running_loop())
        self.carrier = Carrier.INLINE
        self.carrier_reason = CarrierReason.CONFIGURED
        self.wire_mode = WireMode.KV
        self._staging = staging or Staging()
        self._granted = granted
        self.loader: Loader = InlineLoader(max_frame_bytes, self._staging.copier)
        self._claims: dict[bytes, PromptClaim] = {}

    @classmethod
    async def open(
        cls,
        channel: Channel,
        identity: Identity,
        *,
        ttl_s: float,
        max_frame_bytes: int,
        clock: Clock | None = None,
        staging: Staging | None = None,
        granted: Callable[[Granted], None] = lambda granted: None,
    ) -> PrefillSession:
        """Greet, and listen from then on. Raises PlanMismatch or PeerGone, with the channel closed."""
        session = cls(
            channel,
            identity,
            ttl_s=ttl_s,
            max_frame_bytes=max_frame_bytes,
            clock=clock,
            staging=staging,
            granted=granted,
        )
        try:
            await session.greet()
        except BaseException:
            await session.close()
            raise
        session._spawn(session.obey())
        return session

    @property
    def ttl_s(self) -> float:
        """How long decode may be silent, in seconds."""
        return self._ttl_s

    @property
    def num_claims(self) -> int:
        return len(self._claims)

    @asynccontextmanager
    async def claim(self, lease_id: bytes) -> AsyncIterator[PromptClaim]:
        """Claim a lease; call it with blocks for the whole prompt in hand. Raises LeaseLost or PeerGone.

        ``async with`` ends the claim in any case, and tells decode how.
        """
        if self.error is not None:
            raise PeerGone(f"the session to decode is over: {self.error.message}")
        if lease_id in self._claims:
            raise LeaseLost(f"lease {lease_id.hex()} is claimed here already")
        claim = PromptClaim(self, lease_id, clock=self._clock)
        self._claims[lease_id] = claim
        reason = "prefill left the lease unsealed"
        try:
            await claim.ask()
            yield claim
        except ShoalError as error:
            reason = error.message
            raise
        finally:
            del self._claims[lease_id]
            self._take_leave(claim, reason)

    async def drain(self) -> None:
        """Tell decode that no new claims will come, and wait until all claims have ended."""
        self.post(Draining())
        await asyncio.gather(*(claim.left.wait() for claim in self._claims.values()))

    async def cancel_claims(self, reason: str) -> None:
        """Make whoever works on a claim stop, and wait until all have left."""
        claims = tuple(self._claims.values())
        for claim in claims:
            claim.end(Cancelled(reason))
        await asyncio.gather(*(claim.left.wait() for claim in claims))

    def _take_leave(self, claim: PromptClaim, reason: str) -> None:
        if not claim.is_settled:
            self.post(Failed(claim.lease_id, reason))
        claim.left.set()

    async def _exchange(self, ours: Hello) -> Hello:
        theirs = await self._offer(ours)
        if len(theirs.wire_modes) != 1:
            raise ProtocolViolation(f"decode wants {len(theirs.wire_modes)} wire modes, not one")
        [self.wire_mode] = theirs.wire_modes
        return theirs

    async def _offer(self, ours: Hello) -> Hello:
        offer = Offer(self._staging, self._ask)
        try:
            return await offer.make(ours)
        finally:
            self.carrier_reason = offer.reason
            if offer.taken is not None:
                self.loader, self.carrier = offer.taken, offer.taken.carrier

    async def _ask(self, hello: Hello) -> Hello:
        await self._say(hello)
        return await self._listen()

    def _ended(self, error: ShoalError) -> None:
        self.loader.close()
        for claim in self._claims.values():
            claim.end(PeerGone(f"the session to decode ended: {error.message}"))

    def _worked_on(self) -> tuple[bytes, ...]:
        return tuple(self._claims)

    def _beat(self) -> None:
        for lease_id in self.loader.lent_to:
            if lease_id not in self._claims:  # that it has ended was lost, or is on its way
                self.post(Failed(lease_id, "prefill has left it, and waits for its slots"))
        super()._beat()

    def _obey(self, frame: Frame) -> None:
        match frame:
            case Beat():
                pass
            case Granted():
                self._keep_ttl(frame.ttl_s)
                self._granted(frame)
            case Draining():
                self.peer_is_draining = True
            case Accepted() | Refused() | Credit() | Nack() | Committed() | Cancel():
                if isinstance(frame, Accepted):
                    self._keep_ttl(frame.ttl_s)
                self._free_slots(frame)
                claim = self._claims.get(frame.lease_id)
                if claim is not None:
                    claim.obey(frame)
                else:
                    self._late(frame)
            case _:
                raise ProtocolViolation(f"decode sent {type(frame).__name__}, which only prefill may")

    def _keep_ttl(self, ttl_s: float) -> None:
        """Decode's holds for both ends, from the first prompt on: while a new one is rolled out, the pools' differ."""
        if ttl_s != self._ttl_s:
            self._ttl_s = ttl_s
            for timer in self._timers.values():
                timer.cancel()
            self._beat()
            self._watch()

    def _free_slots(self, frame: Frame) -> None:
        """Also for a claim that was left: decode may have been reading its chunks until now."""
        was_full = not self.loader.has_room
        match frame:
            case Credit():
                self.loader.credited(frame.lease_id, frame.seq)
            case Committed() | Cancel():
                self.loader.ended(frame.lease_id)
        if was_full and self.loader.has_room:
            for claim in self._claims.values():
                claim.look_again()

    def _late(self, frame: Accepted | Refused | Credit | Nack | Committed | Cancel) -> None:
        """Drop it; but decode must not wait for somebody who has left."""
        self.num_dropped += 1
        if isinstance(frame, Accepted):
            self.post(Failed(frame.lease_id, "prefill gave the claim up before it was accepted"))


class PromptClaim:
    """One prompt that this process computes for a decode replica. Used by one task at a time.

    ``cancelled`` is set when there is no use in going on: decode cancelled, the session died, or an answer is overdue.
    ``left`` is set when the claim was left, and its blocks are the engine's again.
    """

    def __init__(self, session: PrefillSession, lease_id: bytes, *, clock: Clock) -> None:
        self.lease_id = lease_id
        self.token_ids: tuple[int, ...] = ()
        self.num_present = 0
        self.wire_mode = session.wire_mode
        self.cancelled = asyncio.Event()
        self.left = asyncio.Event()
        self.is_settled = False
        self._session = session
        self._clock = clock
        self._error: ShoalError | None = None
        self._committed = False
        self._credit_bytes = 0
        self._max_frame_bytes = 0
        self._num_chunks = 0
        self._num_written = 0
        self._unacknowledged: dict[int, Chunk] = {}
        self._resent: set[int] = set()
        self._wanted_bytes: int | None = None
        """What the next chunk needs, while it waits to go."""
        self._changed = asyncio.Event()

    async def ask(self) -> None:
        """Claim the lease, and wait for the prompt."""
        self._session.post(Claim(self.lease_id))
        await self._answered(lambda: bool(self.token_ids), "answer to a claim")

    async def send(
        self,
        token_start: int,
        token_end: int,
        layer_start: int,
        layer_end: int,
        payload: memoryview | KvRows,
        wire_mode: WireMode = WireMode.KV,
    ) -> None:
        """Ship K/V ``[layers, tokens, bytes of a token in a layer]``, in C order or where a pool has them, or with
        HIDDEN states ``[tokens, bytes of a state]`` for all of the layers; ``payload`` may be reused afterwards.

        Returns when the last chunk of it is next on the wire. Raises Cancelled if decode gave the lease up, PeerGone if
        the session died, LeaseLost if decode gave no credit for ``ttl_s``.
        """
        loader = self._session.loader
        tokens, layers = (token_start, token_end), (layer_start, layer_end)
        frames = (self.lease_id, self._num_chunks, tokens, layers, payload, self._max_frame_bytes, wire_mode)
        for piece in cut(*frames, gather=loader.gathers or isinstance(payload, KvRows)):
            # Leases take turns: each has at most one chunk in the session's queue. And what was loaded before leaves
            # first, since the next one takes the event loop.
            await self._written()
            self._wanted_bytes = piece.num_bytes
            await self._answered(self._may_go, "credit")
            self._wanted_bytes = None
            self._credit_bytes -= piece.num_bytes
            loaded = loader.load(piece)
            self._unacknowledged[piece.seq] = loaded
            self._num_chunks += 1
            self._session.post(loaded, self._was_written)

    async def seal(
        self, *, boundary_token_id: int, queue_s: float, prefill_s: float, num_cached_tokens: int = 0
    ) -> None:
        """Say that this was all, and wait until decode has verified and committed it. Raises as ``send`` does."""
        digest = prompt_hash(self.token_ids)
        self._session.post(
            Seal(
                self.lease_id,
                self._num_chunks,
                digest,
                boundary_token_id,
                queue_s,
                prefill_s,
                num_cached_tokens,
            )
        )
        await self._answered(lambda: self._committed, "commit")

    # --- what comes in --------------------------------------------------------------------------------

    def obey(self, frame: Accepted | Refused | Credit | Nack | Committed | Cancel) -> None:
        """Act on a frame of this lease. Whatever has come before is ignored: a frame may arrive twice."""
        match frame:
            case Accepted() if not self.token_ids:
                self.token_ids, self.num_present = frame.token_ids, frame.num_present
                self._credit_bytes = frame.credit_bytes
                self._max_frame_bytes = min(self._session.loader.max_bytes, frame.credit_bytes)
            case Refused() if not self.token_ids:
                self.is_settled = True
                self.end(LeaseLost(frame.reason))
            case Credit():
                chunk = self._unacknowledged.pop(frame.seq, None)
                self._credit_bytes += 0 if chunk is None else chunk.num_bytes
            case Nack():
                self._resend(frame.seq)
            case Committed():
                self.is_settled = self._committed = True
                self._unacknowledged.clear()
            case Cancel():
                self.is_settled = True
                self.end(Cancelled(f"decode gave the lease up: {frame.reason}"))
        self._changed.set()

    def end(self, error: ShoalError) -> None:
        """Nothing more will come of this claim, because of ``error``. The first reason stands."""
        if self._error is None and not self._committed:
            self._error = error
            self.cancelled.set()
            self._changed.set()

    def _resend(self, seq: int) -> None:
        chunk = self._unacknowledged.get(seq)
        if chunk is not None and seq not in self._resent:
            self._resent.add(seq)
            self._session.post(chunk)

    # --- waiting --------------------------------------------------------------------------------------

    def look_again(self) -> None:
        """There is room again, which other claims may wait for, too. Who waits for anything else goes on waiting: to
        look would begin its time anew."""
        if self._has_credit():
            self._changed.set()

    def _has_credit(self) -> bool:
        return self._wanted_bytes is not None and self._wanted_bytes <= self._credit_bytes

    def _may_go(self) -> bool:
        return self._has_credit() and self._session.loader.has_room

    async def _written(self) -> None:
        """Wait until no chunk of this lease is in the session's queue, but for one that was asked for again."""
        self._raise_if_ended()
        while self._num_written < self._num_chunks:
            await self._change()

    def _was_written(self) -> None:
        self._num_written += 1
        self._changed.set()

    async def _answered(self, is_so: Callable[[], bool], what: str) -> None:
        """Wait until decode made ``is_so`` true. Raises what ended the claim; LeaseLost after ``ttl_s`` of silence."""
        self._raise_if_ended()
        while not is_so():
            ttl_s = self._session.ttl_s
            overdue = LeaseLost(f"no {what} from decode for {ttl_s:g} s")
            timer = self._clock.call_at(self._clock.time() + ttl_s, partial(self.end, overdue))
            try:
                await self._change()
            finally:
                timer.cancel()

    async def _change(self) -> None:
        self._changed.clear()
        self._raise_if_ended()
        await self._changed.wait()
        self._raise_if_ended()

    def _raise_if_ended(self) -> None:
        if self._error is not None:
            raise self._error
