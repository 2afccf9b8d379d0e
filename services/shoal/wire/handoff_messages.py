"""What decode and prefill say to each other: grants, and the frames of a session (proto/shoal/v1/handoff.proto)."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, fields, replace
from typing import Any

from shoal.wire.messages import RequestContext


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Grant:
    """Decode's invitation to prefill one prompt; goes over the Serve handle, so it holds no token ids.

    ``excluded`` are ids of prefill replicas that have failed this prompt, or get no work: it goes to another one.
    ``prefix_keys`` are for this process' router alone (wire/affinity.py).
    """

    lease_id: bytes
    handoff_address: str
    plan_hash: str
    num_prompt_tokens: int
    num_present: int
    ttl_s: float
    claim_timeout_s: float
    context: RequestContext
    excluded: frozenset[str] = frozenset()
    prefix_keys: tuple[bytes, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """Without the router's keys: by them, whoever reads along could tell prompts that begin alike."""
        *sent, _ = fields(self)
        return Grant, tuple(getattr(self, field.name) for field in sent)


@dataclass(frozen=True, slots=True)
class HandoffOutcome:
    """What prefill's call returns once its lease has ended, or another replica has it. ``reason`` is ``None`` when it
    was committed; ``had_claim`` says whether it was this replica's that wasn't."""

    lease_id: bytes
    committed: bool
    reason: str | None = None
    had_claim: bool = False


class WireMode(enum.StrEnum):
    """What is shipped for the skipped layers: their projected K/V (``KV``) or the state to project (``HIDDEN``)."""

    KV = "kv"
    HIDDEN = "hidden"


class Carrier(enum.StrEnum):
    """How payload travels: in the frames, by memory that both processes have mapped, or by memory that one reads of the
    other through NIXL."""

    INLINE = "inline"
    SHM = "shm"
    NIXL = "nixl"


class CarrierReason(enum.StrEnum):
    """Why a session has the carrier that it has."""

    SAME_HOST = "same_host"
    OTHER_HOST = "other_host"
    NO_ROOM = "no_room"
    NO_NIXL = "no_nixl"
    CONFIGURED = "configured"


@dataclass(frozen=True, slots=True)
class StagingSegment:
    """A file in shared memory, ``num_slots`` slots of ``slot_bytes``, that begins with ``nonce``."""

    name: str
    num_slots: int
    slot_bytes: int
    nonce: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class RemoteSegment:
    """Memory of ``num_slots`` slots of ``slot_bytes`` that begins with ``nonce``, at ``address`` of another process.

    ``agent`` is what NIXL needs to know of the agent that it's read through; it can't be read in any other way.
    """

    agent: bytes = field(repr=False)
    address: int
    num_slots: int
    slot_bytes: int
    nonce: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Hello:
    """First frame of both sides. Version and plan hashes are compared before anything else is looked at.

    ``wire_modes`` are those that prefill can, and the one of them that decode wants.
    ``segment`` is what prefill offers to decode on its host, and what decode says again if it reads from there; so is
    ``remote``, on any host. Where decode doesn't find the first and both sides have NIXL, they greet a second time,
    with the other. ``key`` says which replica of the directory prefill is: nobody else knows it.
    """

    protocol_version: int
    plan_hashes: tuple[str, ...]
    wire_modes: tuple[WireMode, ...] = (WireMode.KV,)
    peer: str = ""
    segment: StagingSegment | None = None
    remote: RemoteSegment | None = None
    has_nixl: bool = False
    key: bytes = b""

    def naming(self, segment: StagingSegment | RemoteSegment) -> Hello:
        """This Hello with ``segment`` in it."""
        return replace(self, segment=segment) if isinstance(segment, StagingSegment) else replace(self, remote=segment)

    def names(self, segment: StagingSegment | RemoteSegment) -> bool:
        return segment in (self.segment, self.remote)


@dataclass(frozen=True, slots=True)
class Granted:
    """Decode asks for this prompt, and will call for it through Serve: prefill begins with what comes first.

    It's what a Grant says, but for the address, which is the one that the session leads to.
    """

    lease_id: bytes
    plan_hash: str
    num_prompt_tokens: int
    num_present: int
    claim_timeout_s: float
    ttl_s: float
    request_id: str
    timeout_s: float
    tenant: str
    attempt: int

    @staticmethod
    def of(grant: Grant) -> Granted:
        context = grant.context
        return Granted(
            grant.lease_id,
            grant.plan_hash,
            grant.num_prompt_tokens,
            grant.num_present,
            grant.claim_timeout_s,
            grant.ttl_s,
            context.request_id,
            context.timeout_s,
            context.tenant,
            context.attempt,
        )

    def at(self, handoff_address: str) -> Grant:
        """The grant of the decode replica there."""
        return Grant(
            self.lease_id,
            handoff_address,
            self.plan_hash,
            self.num_prompt_tokens,
            self.num_present,
            self.ttl_s,
            self.claim_timeout_s,
            RequestContext(self.request_id, self.timeout_s, self.tenant, self.attempt),
        )


@dataclass(frozen=True, slots=True)
class Claim:
    """Prefill holds blocks for the whole prompt and asks to compute it."""

    lease_id: bytes


@dataclass(frozen=True, slots=True)
class Accepted:
    """The claim stands: here is the prompt, and how many payload bytes may be under way unacknowledged."""

    lease_id: bytes
    token_ids: tuple[int, ...]
    num_present: int
    credit_bytes: int
    ttl_s: float


@dataclass(frozen=True, slots=True)
class Refused:
    """The claim does not stand (unknown, taken, expired or ended lease)."""

    lease_id: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class StagedPayload:
    """A payload of ``num_bytes`` in the slot of that index, lent under that ``generation``."""

    slot: int
    generation: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """K/V of tokens ``[token_start, token_end)`` in layers ``[layer_start, layer_end)``.

    ``payload`` is ``[layers, tokens, 2, kv_heads, head_dim]`` in C order, in the plan's KV dtype, little-endian
    (index 0 of the axis of two is K, 1 is V). If ``wire_mode`` is HIDDEN it's the states ``[tokens, hidden]`` that
    these K/V, of all skipped layers, are projected from. ``seq`` counts from 0 within the lease. What is ``staged``
    travels without its payload, and gets it back from its slot.
    """

    lease_id: bytes
    seq: int
    token_start: int
    token_end: int
    layer_start: int
    layer_end: int
    crc32c: int
    payload: bytes | memoryview = field(repr=False)
    staged: StagedPayload | None = None
    wire_mode: WireMode = WireMode.KV

    @property
    def num_bytes(self) -> int:
        """Of the payload, wherever it is."""
        return len(self.payload) if self.staged is None else self.staged.num_bytes


@dataclass(frozen=True, slots=True)
class Seal:
    """The prompt is complete: what decode compares with its own before it publishes.

    ``num_cached_tokens`` at its front prefill needn't compute.
    """

    lease_id: bytes
    num_chunks: int
    prompt_hash: bytes
    boundary_token_id: int
    queue_s: float
    prefill_s: float
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """Prefill gives the lease up."""

    lease_id: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Credit:
    """Chunk ``seq`` is copied and verified: prefill may forget it and send as many bytes again."""

    lease_id: bytes
    seq: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Nack:
    """Chunk ``seq`` was corrupt or lost: send it once more."""

    lease_id: bytes
    seq: int


@dataclass(frozen=True, slots=True)
class Committed:
    """Decode published the blocks: prefill may free its own."""

    lease_id: bytes


@dataclass(frozen=True, slots=True)
class Cancel:
    """Decode no longer wants the prompt: prefill stops within a chunk."""

    lease_id: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Draining:
    """The sender is shutting down: no new claims or grants; open leases finish."""


@dataclass(frozen=True, slots=True)
class Beat:
    """Sent every ttl/3 by both sides; renews the leases that prefill names as those it works on."""

    lease_ids: tuple[bytes, ...] = ()


Frame = (
    Hello | Granted | Claim | Accepted | Refused | Chunk | Seal | Failed | Credit | Nack | Committed | Cancel
    | Draining | Beat
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Envelope:
    """A frame and the incarnation (random 64 bits, one a process start) of the process that sent it."""

    incarnation: int
    frame: Frame
