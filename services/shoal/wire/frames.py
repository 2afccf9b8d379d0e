"""Frames of a hand-off to protobuf and back; nothing that comes in is trusted before it's checked here.

Prefill sends ``SessionRequest`` and decode ``SessionResponse`` (proto/shoal/v1/handoff.proto). What leaves a
``from_…`` function is well formed: ids have their length, ranges aren't empty, numbers are in bounds, text is short.
Whether it also fits the lease is for the transfer layer to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import cache, partial
from typing import Any, TypeVar

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from shoal.errors import ProtocolViolation
from shoal.v1 import handoff_pb2 as pb
from shoal.wire.handoff_messages import (
    Accepted,
    Beat,
    Cancel,
    Chunk,
    Claim,
    Committed,
    Credit,
    Draining,
    Envelope,
    Failed,
    Frame,
    Granted,
    Hello,
    Nack,
    Refused,
    RemoteSegment,
    Seal,
    StagedPayload,
    StagingSegment,
    WireMode,
)
from shoal.wire.values import MAX_TEXT_CHARS, checked_duration, checked_id, checked_ids, checked_range, checked_text

LEASE_ID_BYTES = 16
PROMPT_HASH_BYTES = 32
MAX_PAYLOAD_BYTES = 1 << 20
MAX_STAGED_BYTES = 16 << 20
"""Of a payload that isn't in the frame."""
MAX_PLANS = 256
MAX_SLOTS = 1 << 12
NONCE_BYTES = 16
KEY_BYTES = 16
MAX_PROMPT_TOKENS = 2 << 20
"""A message that brings so many ids is larger than any that is received (wire/options.py)."""
MAX_AGENT_BYTES = 1 << 16
"""Of a NIXL agent's metadata, which grows with the devices of its host."""
MAX_ADDRESS = (1 << 63) - 1
"""Of a remote segment: none of its bytes is beyond 64 bits then."""

_WIRE_MODES: dict[WireMode, pb.WireMode.ValueType] = {
    WireMode.KV: pb.WIRE_MODE_KV,
    WireMode.HIDDEN: pb.WIRE_MODE_HIDDEN,
}
_WIRE_MODES_BACK = {value: mode for mode, value in _WIRE_MODES.items()}

_AnyMessage = TypeVar("_AnyMessage", pb.SessionRequest, pb.SessionResponse)


def to_request(envelope: Envelope) -> pb.SessionRequest:
    """What prefill puts on the wire. Raises ProtocolViolation for a frame that only decode sends."""
    return _encode(envelope, pb.SessionRequest)


def to_response(envelope: Envelope) -> pb.SessionResponse:
    """What decode puts on the wire. Raises ProtocolViolation for a frame that only prefill sends."""
    return _encode(envelope, pb.SessionResponse)


def from_request(message: pb.SessionRequest, payload: memoryview | None = None) -> Envelope:
    """What prefill sent. ``payload`` is a chunk's, if ``message`` lacks it. Raises ProtocolViolation unless it's well
    formed."""
    name = message.WhichOneof("frame")
    if payload is None or name != "chunk":
        return _decode(message, name)
    return _decode(message, name, partial(_from_chunk, payload=payload))


def from_response(message: pb.SessionResponse) -> Envelope:
    """What decode sent. Raises ProtocolViolation unless it's well formed."""
    return _decode(message, message.WhichOneof("frame"))


# --- out ------------------------------------------------------------------------------------------------


def _encode(envelope: Envelope, message_type: type[_AnyMessage]) -> _AnyMessage:
    """The oneof's fields, their messages and those messages' fields have the names of the dataclasses."""
    name = type(envelope.frame).__name__.lower()
    if name not in message_type.DESCRIPTOR.fields_by_name:
        raise ProtocolViolation(f"{message_type.__name__} can't carry {name}: the other side sends it")
    body: Any = _to_body(envelope.frame)
    try:
        return message_type(incarnation=envelope.incarnation, **{name: body})
    except (ValueError, TypeError) as error:
        raise ProtocolViolation(f"{name} doesn't fit the wire: {error}") from error


def _to_body(frame: Frame) -> dict[str, object]:
    values = _values(frame)
    match frame:
        case Hello():
            values["wire_modes"] = [_WIRE_MODES[mode] for mode in frame.wire_modes]
            values["segment"] = frame.segment and _values(frame.segment)
            values["remote"] = frame.remote and _values(frame.remote)
        case Chunk():
            check_payload(frame)
            values["staged"] = frame.staged and _values(frame.staged)
            values["wire_mode"] = _WIRE_MODES[frame.wire_mode]
        case Refused() | Failed() | Cancel():
            # A reason often is an error's text: it's for people, so a long one is cut, not refused.
            values["reason"] = frame.reason[:MAX_TEXT_CHARS]
    return values


def check_payload(chunk: Chunk) -> None:
    """Raises ProtocolViolation if it's too large for a frame."""
    if len(chunk.payload) > MAX_PAYLOAD_BYTES:
        raise ProtocolViolation(f"a chunk of {len(chunk.payload)} bytes is above {MAX_PAYLOAD_BYTES}: split it")


def _values(part: Frame | StagedPayload | StagingSegment | RemoteSegment) -> dict[str, object]:
    kind: Any = type(part)
    return {name: getattr(part, name) for name in _names(kind)}


@cache
def _names(of: type[Any]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(of))


# --- in -------------------------------------------------------------------------------------------------


def _decode(
    message: pb.SessionRequest | pb.SessionResponse, name: str | None, from_body: Callable[..., Frame] | None = None
) -> Envelope:
    if message.incarnation == 0:
        raise ProtocolViolation("a frame without incarnation: every process must send its own")
    if name is None:
        raise ProtocolViolation("an envelope without a frame, or with one that this version doesn't know")
    body = getattr(message, name)
    _require_presence(body, name)
    return Envelope(message.incarnation, (from_body or _FROM_BODY[name])(body))


def _require_presence(body: Message, name: str) -> None:
    """Refuse a scalar that is ``optional`` and not set; a message may be absent."""
    for field in _required(body.DESCRIPTOR):
        if not body.HasField(field):
            raise ProtocolViolation(f"{name}.{field} is not set")


@cache
def _required(descriptor: Descriptor) -> tuple[str, ...]:
    return tuple(field.name for field in descriptor.fields if field.has_presence and field.message_type is None)


def _from_hello(body: pb.Hello) -> Hello:
    if len(body.plan_hashes) > MAX_PLANS or len(body.wire_modes) > len(_WIRE_MODES):
        raise ProtocolViolation(f"hello lists {len(body.plan_hashes)} plans and {len(body.wire_modes)} wire modes")
    hashes = tuple(checked_text(plan, "hello.plan_hashes") for plan in body.plan_hashes)
    modes = tuple(_wire_mode(mode, "hello.wire_modes") for mode in body.wire_modes)
    segment = _from_segment(body.segment) if body.HasField("segment") else None
    remote = _from_remote(body.remote) if body.HasField("remote") else None
    peer = checked_text(body.peer, "hello.peer")
    if len(body.key) not in (0, KEY_BYTES):
        raise ProtocolViolation(f"hello.key has {len(body.key)} bytes, not {KEY_BYTES}")
    return Hello(body.protocol_version, hashes, modes, peer, segment, remote, body.has_nixl, body.key)


def _from_segment(body: pb.StagingSegment) -> StagingSegment:
    _check_slots(body, "hello.segment")
    return StagingSegment(checked_text(body.name, "hello.segment.name"), body.num_slots, body.slot_bytes, body.nonce)


def _from_remote(body: pb.RemoteSegment) -> RemoteSegment:
    _check_slots(body, "hello.remote")
    # What is in it only NIXL knows, and it takes what is written there at its word.
    if not 0 < len(body.agent) <= MAX_AGENT_BYTES:
        raise ProtocolViolation(f"hello.remote.agent has {len(body.agent)} bytes, not 1 to {MAX_AGENT_BYTES}")
    if not 0 < body.address <= MAX_ADDRESS:
        raise ProtocolViolation(f"hello.remote.address is {body.address}")
    return RemoteSegment(body.agent, body.address, body.num_slots, body.slot_bytes, body.nonce)


def _check_slots(body: pb.StagingSegment | pb.RemoteSegment, name: str) -> None:
    if not (0 < body.num_slots <= MAX_SLOTS and 0 < body.slot_bytes <= MAX_STAGED_BYTES):
        raise ProtocolViolation(f"{name} has {body.num_slots} slots of {body.slot_bytes} bytes")
    if len(body.nonce) != NONCE_BYTES:
        raise ProtocolViolation(f"{name}.nonce has {len(body.nonce)} bytes, not {NONCE_BYTES}")


def _from_granted(body: pb.Granted) -> Granted:
    if not 0 < body.num_prompt_tokens <= MAX_PROMPT_TOKENS:
        raise ProtocolViolation(f"granted.num_prompt_tokens is {body.num_prompt_tokens}")
    if body.attempt == 0:
        raise ProtocolViolation("granted.attempt is 0")
    if body.num_present >= body.num_prompt_tokens:
        raise ProtocolViolation(f"granted.num_present is {body.num_present} of {body.num_prompt_tokens} tokens")
    return Granted(
        lease_id=_lease_id(body.lease_id),
        plan_hash=checked_text(body.plan_hash, "granted.plan_hash"),
        num_prompt_tokens=body.num_prompt_tokens,
        num_present=body.num_present,
        claim_timeout_s=_positive(body.claim_timeout_s, "granted.claim_timeout_s"),
        ttl_s=_positive(body.ttl_s, "granted.ttl_s"),
        request_id=checked_text(body.request_id, "granted.request_id"),
        timeout_s=checked_duration(body.timeout_s, "granted.timeout_s"),
        tenant=checked_text(body.tenant, "granted.tenant"),
        attempt=checked_id(body.attempt, "granted.attempt"),
    )


def _from_accepted(body: pb.Accepted) -> Accepted:
    if not body.token_ids:
        raise ProtocolViolation("accepted.token_ids is empty")
    if body.num_present >= len(body.token_ids):
        raise ProtocolViolation(f"accepted.num_present is {body.num_present} of {len(body.token_ids)} tokens")
    if body.credit_bytes == 0:
        raise ProtocolViolation("accepted.credit_bytes is 0")
    ttl_s = _positive(body.ttl_s, "accepted.ttl_s")
    token_ids = checked_ids(body.token_ids, "accepted.token_ids")
    return Accepted(_lease_id(body.lease_id), token_ids, body.num_present, body.credit_bytes, ttl_s)


def _from_chunk(body: pb.Chunk, payload: memoryview | None = None) -> Chunk:
    found: bytes | memoryview = body.payload if payload is None else payload
    staged = _from_staged(body.staged) if body.HasField("staged") else None
    if staged is not None and found:
        raise ProtocolViolation("a chunk brings its payload and names a staging slot, too")
    if staged is None and not 0 < len(found) <= MAX_PAYLOAD_BYTES:
        raise ProtocolViolation(f"chunk.payload has {len(found)} bytes, not 1 to {MAX_PAYLOAD_BYTES}")
    tokens = checked_range(body.token_start, body.token_end, "chunk.token")
    layers = checked_range(body.layer_start, body.layer_end, "chunk.layer")
    seq = checked_id(body.seq, "chunk.seq")
    wire_mode = _wire_mode(body.wire_mode, "chunk.wire_mode")
    return Chunk(_lease_id(body.lease_id), seq, *tokens, *layers, body.crc32c, found, staged, wire_mode)


def _from_staged(body: pb.StagedPayload) -> StagedPayload:
    _require_presence(body, "chunk.staged")
    if body.generation == 0:
        raise ProtocolViolation("chunk.staged.generation is 0")
    if not 0 < body.num_bytes <= MAX_STAGED_BYTES:
        raise ProtocolViolation(f"chunk.staged.num_bytes is {body.num_bytes}, not 1 to {MAX_STAGED_BYTES}")
    return StagedPayload(checked_id(body.slot, "chunk.staged.slot"), body.generation, body.num_bytes)


def _from_seal(body: pb.Seal) -> Seal:
    if len(body.prompt_hash) != PROMPT_HASH_BYTES:
        raise ProtocolViolation(f"seal.prompt_hash has {len(body.prompt_hash)} bytes, not {PROMPT_HASH_BYTES}")
    return Seal(
        lease_id=_lease_id(body.lease_id),
        num_chunks=checked_id(body.num_chunks, "seal.num_chunks"),
        prompt_hash=body.prompt_hash,
        boundary_token_id=checked_id(body.boundary_token_id, "seal.boundary_token_id"),
        queue_s=checked_duration(body.queue_s, "seal.queue_s"),
        prefill_s=checked_duration(body.prefill_s, "seal.prefill_s"),
        num_cached_tokens=checked_id(body.num_cached_tokens, "seal.num_cached_tokens"),
    )


def _from_credit(body: pb.Credit) -> Credit:
    if not 0 < body.num_bytes <= MAX_STAGED_BYTES:
        raise ProtocolViolation(f"credit.num_bytes is {body.num_bytes}, not 1 to {MAX_STAGED_BYTES}")
    return Credit(_lease_id(body.lease_id), checked_id(body.seq, "credit.seq"), body.num_bytes)


_FROM_BODY: dict[str, Callable[..., Frame]] = {
    "hello": _from_hello,
    "granted": _from_granted,
    "accepted": _from_accepted,
    "chunk": _from_chunk,
    "seal": _from_seal,
    "credit": _from_credit,
    "nack": lambda body: Nack(_lease_id(body.lease_id), checked_id(body.seq, "nack.seq")),
    "refused": lambda body: Refused(_lease_id(body.lease_id), checked_text(body.reason, "refused.reason")),
    "failed": lambda body: Failed(_lease_id(body.lease_id), checked_text(body.reason, "failed.reason")),
    "cancel": lambda body: Cancel(_lease_id(body.lease_id), checked_text(body.reason, "cancel.reason")),
    "claim": lambda body: Claim(_lease_id(body.lease_id)),
    "committed": lambda body: Committed(_lease_id(body.lease_id)),
    "draining": lambda body: Draining(),
    "beat": lambda body: Beat(tuple(_lease_id(one) for one in body.lease_ids)),
}


# --- one value ------------------------------------------------------------------------------------------


def _lease_id(value: bytes) -> bytes:
    if len(value) != LEASE_ID_BYTES:
        raise ProtocolViolation(f"a lease id has {LEASE_ID_BYTES} bytes, not {len(value)}")
    return value


def _positive(value: float, name: str) -> float:
    if checked_duration(value, name) == 0:
        raise ProtocolViolation(f"{name} is 0")
    return value


def _wire_mode(value: pb.WireMode.ValueType, name: str) -> WireMode:
    mode = _WIRE_MODES_BACK.get(value)
    if mode is None:
        raise ProtocolViolation(f"{name} is {value}, which this version doesn't know")
    return mode
