"""Decode's desk: here the replica opens leases, and here sessions bring the K/V for them.

::

    async with desk.open(lease_id, token_ids, blocks) as lease:     the replica
        …                                                           asks a prefill replica, by a grant
        arrived = await lease.arrived()                             verified and committed, or a HandoffError
    …                                                               nobody writes into blocks any more

Lives on the event loop. Copies are tasks of the desk, not of a session: they end by themselves, never by a
disconnect, because a copy can't be interrupted in the middle of a block.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from shoal.errors import (
    Cancelled,
    ChecksumMismatch,
    InternalError,
    LeaseLost,
    ProtocolViolation,
    ShoalError,
    Unavailable,
)
from shoal.handoff.base import Clock, KvSink, SilentObserver, Timer, TransferObserver, Unloader
from shoal.handoff.lease import Lease, LeaseState, Receipt
from shoal.handoff.lease_table import LeaseTable, LeaseTimes
from shoal.handoff.terms import PART_NAMES, KvShape, LeaseTerms, Owner, PartBytes
from shoal.model.plan import short_name
from shoal.wire.handoff_messages import Accepted, Cancel, Carrier, Chunk, Committed, Credit, Frame, Nack, Seal

_log = logging.getLogger(__name__)

MAX_CLAIMANTS = 4096
"""Of so many leases, those that were claimed last, it's known by whom: far more than are claimed while one is open."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """What a committed lease brought. ``queue_s`` and ``prefill_s`` are durations that prefill measured;
    ``num_cached_tokens`` of the prompt it needn't compute."""

    queue_s: float
    prefill_s: float
    num_cached_tokens: int
    num_chunks: int
    num_bytes: PartBytes


class Poster(Protocol):
    """Where the desk answers: a session."""

    def post(self, frame: Frame) -> None: ...


class CopyFailed(InternalError):
    """K/V are here and can't be brought into the pool: no other prefill replica's could."""


class OpenLease:
    """What the replica holds while a prompt is on its way."""

    def __init__(self, lease: Lease, blocks: tuple[int, ...], clock: Clock) -> None:
        self.lease = lease
        self.blocks = blocks
        self._clock = clock
        self._opened_s = clock.time()
        self.claimed_s: float | None = None
        self.is_answered = asyncio.Event()
        """Its claim is."""
        self.num_bytes = PartBytes()
        self.blocks_free = asyncio.Event()
        self.outcome: asyncio.Future[Arrived] = asyncio.get_running_loop().create_future()

    @property
    def lease_id(self) -> bytes:
        return self.lease.lease_id

    @property
    def waited_s(self) -> float:
        """Seconds since it was opened."""
        return self._clock.time() - self._opened_s

    async def arrived(self) -> Arrived:
        """Wait until the K/V are committed. Raises the HandoffError, PeerGone or Cancelled that ended the lease."""
        return await asyncio.shield(self.outcome)

    async def cancel(self, reason: str) -> None:
        """Give the lease up, unless it's committed, and wait until nothing writes into the blocks."""
        self.lease.cancel(Cancelled(reason))
        if self.lease.state is not LeaseState.COMMITTED:
            await _whatever_happens(self.blocks_free.wait())


class HandoffDesk:
    """All leases of a decode replica. ``clock`` is by default the running event loop."""

    def __init__(
        self,
        sink: KvSink,
        shape: KvShape,
        *,
        times: LeaseTimes,
        credit_bytes: int,
        clock: Clock | None = None,
        observer: TransferObserver | None = None,
    ) -> None:
        self._sink = sink
        self.shape = shape
        self._credit_bytes = credit_bytes
        self.clock: Clock = clock or asyncio.get_running_loop()
        self.times = times
        self._observer = observer or SilentObserver()
        self.table = LeaseTable(times, clock=self.clock.time, moved=self._moved)
        self.idle = asyncio.Event()
        self.idle.set()
        self._open: dict[bytes, OpenLease] = {}
        self._claimants: OrderedDict[bytes, bytes] = OrderedDict()
        self._posters: dict[Owner, Poster] = {}
        self._copies: set[asyncio.Task[None]] = set()
        self._reaper: Timer | None = None
        self._reaper_s = 0.0
        self._address: str | None = None

    @property
    def address(self) -> str:
        """Where prefill reaches this desk. Raises Unavailable while nobody listens for it."""
        if self._address is None:
            raise Unavailable("this decode replica doesn't listen for hand-offs yet")
        return self._address

    @address.setter
    def address(self, address: str) -> None:
        self._address = address

    # --- for the replica ------------------------------------------------------------------------------

    @property
    def is_closed(self) -> bool:
        """This replica is shutting down."""
        return self.table.is_closed

    @asynccontextmanager
    async def open(
        self,
        lease_id: bytes,
        token_ids: Sequence[int],
        blocks: Sequence[int],
        *,
        num_present: int = 0,
    ) -> AsyncIterator[OpenLease]:
        """Open a lease on ``blocks`` (reserved for this prompt) for all of ``token_ids`` after ``num_present``.

        When the block ends, nobody writes into ``blocks`` any more: a lease that isn't committed by then is
        cancelled, and its last copy waited for. Raises Unavailable once the desk is closed.
        """
        terms = LeaseTerms(tuple(token_ids), num_present, self.shape, self._credit_bytes)
        lease = self.table.reserve(lease_id, terms)
        held = OpenLease(lease, tuple(blocks), self.clock)
        self._open[lease_id] = held
        try:
            yield held
        finally:
            try:
                await held.cancel("decode left the lease before its K/V had arrived")
            finally:
                lease.release()
                if held.outcome.done():
                    held.outcome.exception()  # looked at: nobody may have waited for it

    async def until_answered(self, lease_id: bytes, within_s: float) -> bool:
        """Wait until a claim of the lease is answered, but no longer than ``within_s``; whether it is."""
        held = self._open.get(lease_id)
        if held is None:
            return False
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await held.is_answered.wait()
        return held.is_answered.is_set()

    def close(self) -> None:
        """Open no more leases; those that are open go on."""
        self.table.close()

    async def stop(self, error: ShoalError) -> None:
        """End every lease that isn't committed with ``error``, wait for the copies under way, and reap no more."""
        self.close()
        for lease in self.table.uncommitted():
            lease.cancel(error)
        if self._copies:
            await asyncio.wait(self._copies)
        if self._reaper is not None:
            self._reaper.cancel()

    # --- for sessions ---------------------------------------------------------------------------------

    def session_began(self, owner: Owner, poster: Poster) -> None:
        self._posters[owner] = poster

    def session_ended(self, owner: Owner, error: ShoalError) -> None:
        """Its leases go with it: a retry mints new ones."""
        self._posters.pop(owner, None)
        for lease in self.table.uncommitted(owner):
            lease.cancel(error)

    def claim(self, lease_id: bytes, owner: Owner, plan_hashes: Sequence[str]) -> Accepted:
        """Give the lease to ``owner``, whose process runs ``plan_hashes``. Raises LeaseLost."""
        if self.shape.plan_hash not in plan_hashes:
            raise LeaseLost(
                f"lease {lease_id.hex()} is for plan {short_name(self.shape.plan_hash)}, which you don't run"
            )
        terms = self.table.claim(lease_id, owner).terms
        self._claimants[lease_id] = owner.key
        if len(self._claimants) > MAX_CLAIMANTS:
            self._claimants.popitem(last=False)
        return Accepted(lease_id, terms.token_ids, terms.num_present, terms.credit_bytes, self.times.ttl_s)

    def claimant(self, lease_id: bytes) -> bytes:
        """The key of the process that has claimed the lease, also for a while after its end; nothing if none has."""
        return self._claimants.get(lease_id, b"")

    def answered(self, lease_id: bytes) -> None:
        """What ``claim`` returned is written."""
        if (held := self._open.get(lease_id)) is not None:
            held.is_answered.set()

    def receive(self, lease: Lease, chunk: Chunk, staging: Unloader | None) -> None:
        """Copy a good chunk, which came inline or by ``staging``; ask once more for a bad one. Raises a HandoffError
        that must end the lease."""
        match lease.receive(chunk):
            case Receipt.COPY:
                task = asyncio.get_running_loop().create_task(self._copy(self._open[lease.lease_id], chunk, staging))
                self._copies.add(task)
                task.add_done_callback(self._copy_ended)
            case Receipt.RESEND:
                self._ask_again(lease, chunk)
            case _:
                pass

    def seal(self, lease: Lease, seal: Seal) -> None:
        """Raises a HandoffError that must end the lease."""
        for seq in lease.seal(seal):
            self._post(lease, Nack(lease.lease_id, seq))
        self._commit_if_complete(lease)

    # --- inside ---------------------------------------------------------------------------------------

    async def _copy(self, held: OpenLease, chunk: Chunk, staging: Unloader | None) -> None:
        lease = held.lease
        crc32c: int | None = None
        error: ShoalError | None = CopyFailed("a copy into the pool failed; the log says more")
        try:
            crc32c = await self._sink.write(held.blocks, chunk, partial(_is_there, chunk, staging))
            error = None
        except ShoalError as known:
            error = known
        finally:
            if error is not None:
                lease.cancel(error)
            self._copied(held, chunk, crc32c, Carrier.INLINE if staging is None else staging.carrier)

    def _copied(self, held: OpenLease, chunk: Chunk, crc32c: int | None, carrier: Carrier) -> None:
        lease = held.lease
        try:
            receipt = lease.copied(chunk.seq, crc32c)
        except ChecksumMismatch as error:
            lease.cancel(error)
            return
        match receipt:
            case Receipt.CREDIT:
                self._count(held, chunk, carrier)
                self._post(lease, Credit(lease.lease_id, chunk.seq, chunk.num_bytes))
                self._commit_if_complete(lease)
            case Receipt.RESEND:
                self._ask_again(lease, chunk)
            case _:
                pass

    def _ask_again(self, lease: Lease, chunk: Chunk) -> None:
        self._observer.verify_failed("checksum")
        self._post(lease, Nack(lease.lease_id, chunk.seq))

    def _count(self, held: OpenLease, chunk: Chunk, carrier: Carrier) -> None:
        parts = self.shape.part_bytes(chunk)
        held.num_bytes += parts
        for part in PART_NAMES:
            self._observer.shipped(part, getattr(parts, part), carrier)

    def _copy_ended(self, task: asyncio.Task[None]) -> None:
        self._copies.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a copy into the pool failed", exc_info=error)

    def _commit_if_complete(self, lease: Lease) -> None:
        if lease.is_complete:
            try:
                lease.commit()
            except ProtocolViolation as error:
                lease.cancel(error)

    def _post(self, lease: Lease, frame: Frame) -> None:
        poster = None if lease.owner is None else self._posters.get(lease.owner)
        if poster is not None:
            poster.post(frame)

    def _moved(self, lease: Lease, left: LeaseState | None) -> None:
        if left is not None:
            held = self._open[lease.lease_id]
            match lease.state:
                case LeaseState.STREAMING:
                    held.claimed_s = self.clock.time()
                    self._observer.transfer_started()
                case LeaseState.COMMITTED:
                    self._committed(held)
                case LeaseState.CANCELLING:
                    self._cancelled(held)
                case LeaseState.RELEASED:
                    held.blocks_free.set()
                    del self._open[lease.lease_id]
                    self._observer.lease_ended(held.waited_s)
        self._observer.leases(self.table.counts)
        self.idle.clear() if self.table.num_open else self.idle.set()
        self._arm_reaper()

    def _committed(self, held: OpenLease) -> None:
        seal = held.lease.sealed
        if seal is None or held.claimed_s is None:
            raise InternalError(f"{held.lease} was committed without a claim or a seal")
        self._post(held.lease, Committed(held.lease_id))
        arrived = Arrived(seal.queue_s, seal.prefill_s, seal.num_cached_tokens, seal.num_chunks, held.num_bytes)
        held.outcome.set_result(arrived)
        self._observer.transfer_committed(self.clock.time() - held.claimed_s)

    def _cancelled(self, held: OpenLease) -> None:
        lease, error = held.lease, held.lease.error
        if error is None:
            raise InternalError(f"{lease} was cancelled without an error")
        self._post(lease, Cancel(lease.lease_id, error.message))
        held.outcome.set_exception(error)
        if lease.failed_check is not None:
            self._observer.verify_failed(lease.failed_check)
        if lease.owner is not None:
            self._observer.transfer_failed(error.code)

    # --- the reaper -----------------------------------------------------------------------------------

    def _arm_reaper(self) -> None:
        """Be called when the next lease may expire; renewals only make that a little early."""
        when = self.table.next_deadline
        if when is None or (self._reaper is not None and self._reaper_s <= when):
            return
        if self._reaper is not None:
            self._reaper.cancel()
        self._reaper_s = when
        self._reaper = self.clock.call_at(when, self._reap)

    def _reap(self) -> None:
        self._reaper = None
        for _ in self.table.expire():
            self._observer.lease_expired()
        self._arm_reaper()


def _is_there(chunk: Chunk, staging: Unloader | None) -> bool:
    return chunk.staged is None or (staging is not None and staging.is_there(chunk.staged))


async def _whatever_happens(work: Coroutine[object, object, object]) -> None:
    """Wait for ``work`` to end, also if the caller is cancelled meanwhile: that is raised only then."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
