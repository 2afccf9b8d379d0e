"""What a hand-off is built on: channels, the sink, the clock, the observer, and the two digests of a prompt's K/V."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import google_crc32c
import numpy as np

from shoal.handoff.frames import Piece
from shoal.wire.handoff_messages import Carrier, Chunk, Envelope, RemoteSegment, StagedPayload, StagingSegment


class Channel(Protocol):
    """One end of an ordered, bidirectional stream of envelopes."""

    async def send(self, envelope: Envelope) -> None:
        """Hand ``envelope`` over; waits while the other end is slow. Raises PeerGone once the channel is closed."""
        ...

    async def receive(self) -> Envelope:
        """The next envelope. Raises PeerGone once the channel is closed from either end.

        Raises ProtocolViolation for something that is no envelope, and whatever HandoffError the other end left.
        """
        ...

    async def close(self) -> None:
        """End the channel for both ends; what was sent before may still arrive. Twice is a no-op."""
        ...


class Loader(Protocol):
    """Prefill's end of a carrier: how payload leaves, in one session."""

    @property
    def max_bytes(self) -> int:
        """The largest payload."""
        ...

    @property
    def has_room(self) -> bool:
        """There may be none until decode has copied what is there."""
        ...

    @property
    def lent_to(self) -> Collection[bytes]:
        """Leases of which decode may still read something here."""
        ...

    @property
    def gathers(self) -> bool:
        """Bytes are copied once more in any case, so a piece may be put together from several runs of them."""
        ...

    def load(self, piece: Piece) -> Chunk:
        """``piece`` as it travels, with its checksum, so that the memory of its payload may be reused. Takes
        ``has_room``."""
        ...

    def credited(self, lease_id: bytes, seq: int) -> None:
        """Decode has copied this chunk. Twice is a no-op."""
        ...

    def ended(self, lease_id: bytes) -> None:
        """Decode reads nothing more of this lease. Twice is a no-op."""
        ...

    def close(self) -> None:
        """The session is over, for both ends. Twice is a no-op."""
        ...


class StagingLoader(Loader, Protocol):
    """A loader with memory that decode has to find first."""

    @property
    def carrier(self) -> Carrier: ...

    @property
    def segment(self) -> StagingSegment | RemoteSegment: ...

    def hide(self) -> None:
        """Decode has found it, and nobody else shall."""
        ...


class Unloader(Protocol):
    """Decode's end of a carrier with memory of its own."""

    @property
    def carrier(self) -> Carrier: ...

    @property
    def segment(self) -> StagingSegment | RemoteSegment: ...

    def unload(self, chunk: Chunk, staged: StagedPayload, arrived: Callable[[Chunk], None]) -> None:
        """Call ``arrived`` with the payload: an empty one if it isn't there any more.

        At once or later, on the event loop, and never for a session that is over. The place is one of the segment's.
        """
        ...

    def is_there(self, staged: StagedPayload) -> bool:
        """Whether what ``arrived`` was given is still what was staged. Asked before it's read, and again afterwards, on
        any thread."""
        ...

    def close(self) -> None:
        """The session is over. Twice is a no-op."""
        ...


class KvSink(Protocol):
    """Decode's side of the pool."""

    async def write(self, blocks: Sequence[int], chunk: Chunk, is_there: Callable[[], bool]) -> int | None:
        """Copy ``chunk`` into ``blocks``, the request's reserved ones, in order, and return the CRC32C of what was
        copied: ``None`` unless it ``is_there`` before and after.

        Waits for other copies alone: no scheduler, no block, no other lease. Once it returns or raises, nothing writes
        into ``blocks`` any more.
        """
        ...


class Timer(Protocol):
    def cancel(self) -> None: ...


class Clock(Protocol):
    """Monotonic seconds, and calls at a given time. A running asyncio event loop is one."""

    def time(self) -> float: ...

    def call_at(self, when: float, callback: Callable[[], object], /) -> Timer: ...


class TransferObserver(Protocol):
    """Is told what happens; ``telemetry.TransferMetrics`` is one. Times are seconds."""

    def transfer_started(self) -> None:
        """A claim was accepted."""

    def transfer_committed(self, seconds: float) -> None:
        """A transfer that had started was committed, so long after its claim."""

    def transfer_failed(self, reason: str) -> None:
        """A transfer that had started ended without a commit. ``reason`` is an error's code."""

    def shipped(self, part: str, num_bytes: int, carrier: Carrier) -> None:
        """Payload was copied; ``part`` is ``shallow``, ``deep`` or ``hidden``."""

    def verify_failed(self, check: str) -> None:
        """A chunk or prompt did not pass: ``checksum``, ``tiling``, ``prompt_hash`` or ``boundary_token``."""

    def leases(self, num_by_state: Mapping[str, int]) -> None:
        """How many leases are in each state; a state that isn't named has none."""

    def lease_ended(self, age_s: float) -> None:
        """A lease that was reserved so long ago holds nothing any more."""

    def lease_expired(self) -> None:
        """Nobody claimed or renewed a lease in time."""


class SilentObserver:
    """Tells nobody."""

    def transfer_started(self) -> None: ...

    def transfer_committed(self, seconds: float) -> None: ...

    def transfer_failed(self, reason: str) -> None: ...

    def shipped(self, part: str, num_bytes: int, carrier: Carrier) -> None: ...

    def verify_failed(self, check: str) -> None: ...

    def leases(self, num_by_state: Mapping[str, int]) -> None: ...

    def lease_ended(self, age_s: float) -> None: ...

    def lease_expired(self) -> None: ...


def new_incarnation() -> int:
    """Names this process start to its peers: random 64 bits, never zero."""
    return secrets.randbits(64) | 1


def crc32c(payload: bytes | memoryview) -> int:
    """CRC32C of a chunk's payload."""
    # The library takes no memoryview, but an array of one, without a copy.
    value: int = google_crc32c.value(np.frombuffer(payload, np.uint8))
    return value


def prompt_hash(token_ids: Sequence[int]) -> bytes:
    """SHA-256 over the ids as little-endian int64, 32 bytes: both sides must mean the same prompt."""
    return hashlib.sha256(np.asarray(token_ids, dtype="<i8").tobytes()).digest()
