"""One prompt's hand-off as decode sees it: a state machine that knows no clock, no thread and no wire.

::

    RESERVED ──claim──> STREAMING ──seal──> SEALED ──commit──> COMMITTED ──release──> RELEASED
       │                    │                 │                                          ^
       └────────────────────┴── cancel ───────┘                                          │
                            v                                                            │
                       CANCELLING ── no copy in flight ──────────────────────────────────┘

RESERVED    decode holds blocks; whoever claims the lease first owns it
STREAMING   chunks arrive and are copied at once into the blocks, which nobody reads yet
SEALED      prefill says that this was all; chunks that are missing are asked for once more
COMMITTED   everything matched: the blocks may be read
CANCELLING  given up, for whatever reason; a copy may still be writing into the blocks
RELEASED    nothing is held

Decode alone writes into the blocks, so a writer in another process needs no state: its late frames are dropped.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from shoal.errors import ChecksumMismatch, InternalError, LeaseLost, ProtocolViolation, ShoalError
from shoal.handoff.base import prompt_hash
from shoal.handoff.coverage import Coverage
from shoal.handoff.terms import LeaseTerms, Owner
from shoal.wire.handoff_messages import Chunk, Seal, WireMode


class LeaseState(enum.StrEnum):
    RESERVED = "reserved"
    STREAMING = "streaming"
    SEALED = "sealed"
    COMMITTED = "committed"
    CANCELLING = "cancelling"
    RELEASED = "released"


_NEXT = {
    LeaseState.RESERVED: {LeaseState.STREAMING, LeaseState.CANCELLING},
    LeaseState.STREAMING: {LeaseState.SEALED, LeaseState.CANCELLING},
    LeaseState.SEALED: {LeaseState.COMMITTED, LeaseState.CANCELLING},
    LeaseState.COMMITTED: {LeaseState.RELEASED},
    LeaseState.CANCELLING: {LeaseState.RELEASED},
}

UNCOMMITTED = frozenset({LeaseState.RESERVED, LeaseState.STREAMING, LeaseState.SEALED})
RECEIVING = frozenset({LeaseState.STREAMING, LeaseState.SEALED})


class Receipt(enum.Enum):
    """What to do about a chunk that came in, and then about one that was copied."""

    COPY = enum.auto()
    CREDIT = enum.auto()
    RESEND = enum.auto()
    DROP = enum.auto()


class Lease:
    """``moved`` is called after every change of state with the lease and the state that it left.

    Whatever raises a HandoffError leaves the lease as it was: the caller cancels it with that ``error``.
    ``failed_check`` then names the check that it did not pass, if it was one.
    """

    def __init__(
        self,
        lease_id: bytes,
        terms: LeaseTerms,
        *,
        moved: Callable[[Lease, LeaseState | None], None],
    ) -> None:
        self.lease_id = lease_id
        self.terms = terms
        self.state = LeaseState.RESERVED
        self.owner: Owner | None = None
        self.sealed: Seal | None = None
        self.error: ShoalError | None = None
        self.failed_check: str | None = None
        self._moved = moved
        self._coverage = Coverage(terms.num_present, len(terms.token_ids) - 1, terms.shape.num_layers)
        self._seen: set[int] = set()
        self._nacked: set[int] = set()
        self._copying: dict[int, Chunk] = {}
        self._uncredited_bytes = 0
        moved(self, None)

    def __repr__(self) -> str:
        return f"Lease({self.lease_id.hex()[:8]}, {self.state}, {len(self._copying)} copies)"

    # --- the way to COMMITTED -------------------------------------------------------------------------

    def claim(self, owner: Owner) -> None:
        """The first session gets it; claiming again is a no-op for that one. Raises LeaseLost for all others."""
        if self.owner == owner and self.state in RECEIVING:
            return
        if self.state is not LeaseState.RESERVED:
            raise LeaseLost(f"lease {self.lease_id.hex()} is {self.state}: ask for a new grant")
        self.owner = owner
        self._move(LeaseState.STREAMING)

    @property
    def is_unclaimed(self) -> bool:
        """Nobody has claimed it yet, and somebody still may."""
        return self.state is LeaseState.RESERVED

    @property
    def has_begun(self) -> bool:
        """Some of it has come, or nothing is to come."""
        return bool(self._seen) or self.sealed is not None

    def has(self, seq: int) -> bool:
        """This chunk was taken before."""
        return seq in self._seen

    def receive(self, chunk: Chunk) -> Receipt:
        """Judge a chunk by all but its bytes; COPY takes it and starts its copy, which ``copied`` ends.

        A ``seq`` that was taken before is dropped; one that has lost its payload is to be sent again. Raises
        ChecksumMismatch for the second of them, ProtocolViolation for one that breaks a limit, overlaps, or lies
        outside.
        """
        if self.has(chunk.seq):
            return Receipt.DROP
        self._check_limits(chunk)
        if len(chunk.payload) != chunk.num_bytes:
            return self._refuse_corrupt(chunk.seq)
        try:
            self._coverage.add(chunk.token_start, chunk.token_end, chunk.layer_start, chunk.layer_end)
        except ProtocolViolation:
            self.failed_check = "tiling"
            raise
        self._seen.add(chunk.seq)
        self._copying[chunk.seq] = chunk
        self._uncredited_bytes += chunk.num_bytes
        return Receipt.COPY

    def copied(self, seq: int, crc32c: int | None) -> Receipt:
        """The copy of chunk ``seq`` has ended: nothing of it touches the blocks any more. ``crc32c`` is of what it
        wrote, ``None`` if that can't be said.

        CREDIT if that is what prefill sent; the first corrupt one is to be sent again, as if it had never come. Raises
        ChecksumMismatch for the second. DROP if the lease isn't receiving any more.
        """
        chunk = self._copying.pop(seq)
        self._uncredited_bytes -= chunk.num_bytes
        if self.state not in RECEIVING:
            self._settle()
            return Receipt.DROP
        if crc32c == chunk.crc32c:
            return Receipt.CREDIT
        self._seen.remove(seq)
        self._coverage.remove(chunk.token_start, chunk.token_end, chunk.layer_start, chunk.layer_end)
        return self._refuse_corrupt(seq)

    def seal(self, seal: Seal) -> tuple[int, ...]:
        """Take prefill's word that this was all, if it means this very prompt. Returns the chunks to ask for again.

        The same seal twice is a no-op. Raises ProtocolViolation for another prompt, or an impossible number of chunks.
        """
        if seal == self.sealed:
            return ()
        if self.sealed is not None:
            raise ProtocolViolation("sealed twice, differently")
        self._check_seal(seal)
        self.sealed = seal
        known = self._seen | self._nacked
        missing = tuple(seq for seq in range(seal.num_chunks) if seq not in known)
        self._nacked.update(missing)
        self._move(LeaseState.SEALED)
        return missing

    @property
    def is_complete(self) -> bool:
        """Sealed, and every chunk is here and copied."""
        return (
            self.state is LeaseState.SEALED
            and self.sealed is not None
            and len(self._seen) == self.sealed.num_chunks
            and not self._copying
        )

    def commit(self) -> None:
        """Let the blocks be read. Raises ProtocolViolation unless what arrived tiles the prompt."""
        if not self.is_complete:
            raise InternalError(f"{self} can't be committed: it isn't complete")
        if not self._coverage.is_complete:
            self.failed_check = "tiling"
            raise ProtocolViolation(
                f"{self._coverage.num_covered} of {self._coverage.num_cells} token-layers arrived, in all its chunks"
            )
        self._move(LeaseState.COMMITTED)

    # --- the way out ----------------------------------------------------------------------------------

    @property
    def num_copies(self) -> int:
        return len(self._copying)

    def cancel(self, error: ShoalError) -> bool:
        """Give an uncommitted lease up because of ``error``; False, and no change, if it is past that."""
        if self.state not in UNCOMMITTED:
            return False
        # The lease outlives what raised it: a traceback would hold the chunk, and a buffer that its session needs.
        self.error = error.with_traceback(None)
        self._move(LeaseState.CANCELLING)
        self._settle()
        return True

    def release(self) -> None:
        """The blocks of a committed lease are its request's now. Anything else is a no-op."""
        if self.state is LeaseState.COMMITTED:
            self._move(LeaseState.RELEASED)

    def _settle(self) -> None:
        if self.state is LeaseState.CANCELLING and not self._copying:
            self._move(LeaseState.RELEASED)

    def _move(self, state: LeaseState) -> None:
        if state not in _NEXT.get(self.state, ()):
            raise InternalError(f"a lease can't go from {self.state} to {state}")
        left, self.state = self.state, state
        self._moved(self, left)

    # --- what is checked ------------------------------------------------------------------------------

    def _check_limits(self, chunk: Chunk) -> None:
        last = self._coverage.num_cells if self.sealed is None else self.sealed.num_chunks
        if not 0 <= chunk.seq < last:
            raise ProtocolViolation(f"chunk {chunk.seq} of at most {last}")
        self._check_wire_mode(chunk)
        num_bytes = chunk.num_bytes
        expected = self.terms.shape.part_bytes(chunk).total
        if num_bytes != expected:
            raise ProtocolViolation(f"chunk {chunk.seq} has {num_bytes} bytes where its ranges need {expected}")
        if self._uncredited_bytes + num_bytes > self.terms.credit_bytes:
            raise ProtocolViolation(f"chunk {chunk.seq} goes beyond the credit of {self.terms.credit_bytes} bytes")

    def _check_wire_mode(self, chunk: Chunk) -> None:
        """States come if they were asked for, and then in the place of all projected K/V."""
        shape = self.terms.shape
        asked = WireMode.KV if self.owner is None else self.owner.wire_mode
        is_deep = chunk.layer_end > shape.num_shallow_layers
        if chunk.wire_mode is not (asked if is_deep else WireMode.KV):
            raise ProtocolViolation(
                f"chunk {chunk.seq} brings {chunk.wire_mode} of layers [{chunk.layer_start}, {chunk.layer_end}), "
                f"{asked} was agreed on for those from {shape.num_shallow_layers} on"
            )
        layers = (chunk.layer_start, chunk.layer_end)
        if chunk.wire_mode is WireMode.HIDDEN and layers != (shape.num_shallow_layers, shape.num_layers):
            raise ProtocolViolation(f"chunk {chunk.seq} brings states for layers {layers}, not for all skipped ones")

    def _refuse_corrupt(self, seq: int) -> Receipt:
        if seq in self._nacked:
            self.failed_check = "checksum"
            raise ChecksumMismatch(f"chunk {seq} was corrupt or lost, and is corrupt again")
        self._nacked.add(seq)
        return Receipt.RESEND

    def _check_seal(self, seal: Seal) -> None:
        if seal.prompt_hash != prompt_hash(self.terms.token_ids):
            self.failed_check = "prompt_hash"
            raise ProtocolViolation("prefill sealed another prompt: the hashes of the token ids differ")
        if seal.boundary_token_id != self.terms.token_ids[-1]:
            self.failed_check = "boundary_token"
            raise ProtocolViolation(
                f"prefill's boundary token is {seal.boundary_token_id}, decode's {self.terms.token_ids[-1]}"
            )
        num_tokens = len(self.terms.token_ids)
        if seal.num_cached_tokens >= num_tokens:
            raise ProtocolViolation(f"sealed with {seal.num_cached_tokens} cached tokens of a prompt of {num_tokens}")
        # What was lost was never credited, so that more than the credit can't be missing.
        max_missing = self.terms.credit_bytes // self.terms.shape.least_chunk_bytes
        max_chunks = min(self._coverage.num_cells, len(self._seen) + max_missing)
        if not max(self._seen, default=-1) < seal.num_chunks <= max_chunks:
            self.failed_check = "tiling"
            raise ProtocolViolation(f"sealed with {seal.num_chunks} chunks after {len(self._seen)} had arrived")
