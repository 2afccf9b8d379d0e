from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ProtocolViolation
from shoal.v1 import handoff_pb2 as pb
from shoal.wire import frames, handoff_messages
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
from shoal.wire.values import MAX_ID, MAX_TEXT_CHARS

LEASE = bytes(range(16))
INCARNATION = (1 << 64) - 1

PREFILL_FRAMES: tuple[Frame, ...] = (
    Hello(1, ("plan-a", "plan-b"), (WireMode.KV, WireMode.HIDDEN), "prefill-0"),
    Hello(1, ("plan-a",), (WireMode.KV,), "prefill-0", key=bytes(range(16))),
    Hello(1, ("plan-a",), (WireMode.KV,), "", StagingSegment("shoal-0", 1, 1 << 20, bytes(range(16)))),
    Hello(1, ("plan-a",), remote=RemoteSegment(b"a" * 300, frames.MAX_ADDRESS, 7, 1 << 20, bytes(16)), has_nixl=True),
    Claim(LEASE),
    Chunk(LEASE, 0, 0, 512, 0, 3, 0, b"\x00\xff" * 700),
    Chunk(LEASE, 0, 0, 512, 0, 3, 0, b"", StagedPayload(0, (1 << 64) - 1, 16 << 20)),
    Seal(LEASE, 0, bytes(32), 0, 0.0, 0.25),
    Seal(LEASE, 1, bytes(32), 7, 0.5, 0.25, 48),
    Failed(LEASE, "out of blocks"),
    Draining(),
    Beat(),
    Beat((LEASE, bytes(16))),
)
DECODE_FRAMES: tuple[Frame, ...] = (
    Hello(1, (), (), ""),
    Granted(LEASE, "plan-a", frames.MAX_PROMPT_TOKENS, 0, 30.0, 5.0, "a-request", 0.0, "default", 1),
    Accepted(LEASE, (0, 49151, MAX_ID), 0, 16 << 20, 5.0),
    Refused(LEASE, "unknown lease"),
    Credit(LEASE, 0, 16 << 20),
    Nack(LEASE, MAX_ID),
    Committed(LEASE),
    Cancel(LEASE, "the client went away"),
    Draining(),
    Beat(),
)


def over_the_wire_to_decode(envelope: Envelope) -> Envelope:
    return frames.from_request(pb.SessionRequest.FromString(frames.to_request(envelope).SerializeToString()))


def over_the_wire_to_prefill(envelope: Envelope) -> Envelope:
    return frames.from_response(pb.SessionResponse.FromString(frames.to_response(envelope).SerializeToString()))


@pytest.mark.parametrize("frame", PREFILL_FRAMES, ids=lambda frame: type(frame).__name__)
def test_what_prefill_sends_arrives_unchanged(frame: Frame) -> None:
    envelope = Envelope(INCARNATION, frame)
    assert over_the_wire_to_decode(envelope) == envelope


@pytest.mark.parametrize("frame", DECODE_FRAMES, ids=lambda frame: type(frame).__name__)
def test_what_decode_sends_arrives_unchanged(frame: Frame) -> None:
    envelope = Envelope(1, frame)
    assert over_the_wire_to_prefill(envelope) == envelope


def test_the_round_trips_cover_every_frame_and_each_oneof_holds_exactly_its_sides() -> None:
    every_frame = set(handoff_messages.Frame.__args__)
    for sent, message in ((PREFILL_FRAMES, pb.SessionRequest), (DECODE_FRAMES, pb.SessionResponse)):
        in_proto = {field.message_type.name for field in message.DESCRIPTOR.oneofs_by_name["frame"].fields}
        assert {type(frame).__name__ for frame in sent} == in_proto
    assert {type(frame) for frame in PREFILL_FRAMES + DECODE_FRAMES} == every_frame


@pytest.mark.parametrize(
    ("send", "envelope"),
    [
        (frames.to_request, Envelope(1 << 64, Beat())),
        (frames.to_request, Envelope(1, Hello(1 << 32, ()))),
        (frames.to_request, Envelope(1, Claim("not bytes"))),  # type: ignore[arg-type]
        (frames.to_request, Envelope(1, Chunk(LEASE, 0, 0, 1, 0, 1, 0, bytes((1 << 20) + 1)))),
        (frames.to_response, Envelope(1, Nack(LEASE, -1))),
    ],
    ids=["incarnation", "version", "type", "payload", "negative"],
)
def test_what_does_not_fit_the_wire_is_not_sent(send: Callable[[Envelope], object], envelope: Envelope) -> None:
    with pytest.raises(ProtocolViolation):
        send(envelope)


def test_a_payload_of_exactly_one_mebibyte_passes() -> None:
    envelope = Envelope(1, Chunk(LEASE, 0, 0, 1, 0, 1, 0, bytes(1 << 20)))
    assert over_the_wire_to_decode(envelope) == envelope


def test_a_long_reason_is_cut_and_not_refused() -> None:
    arrived = over_the_wire_to_decode(Envelope(1, Failed(LEASE, "x" * 5000)))
    assert arrived.frame == Failed(LEASE, "x" * MAX_TEXT_CHARS)


def test_an_envelope_without_a_frame_is_refused() -> None:
    with pytest.raises(ProtocolViolation, match="without a frame"):
        frames.from_request(pb.SessionRequest(incarnation=1))


def test_a_frame_of_a_later_version_is_refused() -> None:
    unknown_field_99 = pb.SessionRequest.FromString(b"\x09" + (1).to_bytes(8, "little") + b"\x9a\x06\x00")
    with pytest.raises(ProtocolViolation, match="doesn't know"):
        frames.from_request(unknown_field_99)


def test_an_envelope_without_incarnation_is_refused() -> None:
    with pytest.raises(ProtocolViolation, match="incarnation"):
        frames.from_request(pb.SessionRequest(beat=pb.Beat()))


GOOD: dict[str, dict[str, Any]] = {
    "hello": {"protocol_version": 1, "plan_hashes": ["p"], "wire_modes": [pb.WIRE_MODE_KV], "peer": "p"},
    "claim": {"lease_id": LEASE},
    "chunk": {
        "lease_id": LEASE,
        "seq": 0,
        "token_start": 0,
        "token_end": 1,
        "layer_start": 0,
        "layer_end": 1,
        "crc32c": 0,
        "payload": b"p",
        "wire_mode": pb.WIRE_MODE_KV,
    },
    "seal": {
        "lease_id": LEASE,
        "num_chunks": 1,
        "prompt_hash": bytes(32),
        "boundary_token_id": 0,
        "queue_s": 0.0,
        "prefill_s": 0.0,
    },
    "failed": {"lease_id": LEASE, "reason": "r"},
    "granted": {
        "lease_id": LEASE,
        "plan_hash": "p",
        "num_prompt_tokens": 2,
        "num_present": 0,
        "claim_timeout_s": 30.0,
        "ttl_s": 5.0,
        "request_id": "r",
        "timeout_s": 0.0,
        "tenant": "t",
        "attempt": 1,
    },
    "accepted": {"lease_id": LEASE, "token_ids": [1, 2], "num_present": 0, "credit_bytes": 1, "ttl_s": 1.0},
    "refused": {"lease_id": LEASE, "reason": "r"},
    "credit": {"lease_id": LEASE, "seq": 0, "num_bytes": 1},
    "nack": {"lease_id": LEASE, "seq": 0},
    "committed": {"lease_id": LEASE},
    "cancel": {"lease_id": LEASE, "reason": "r"},
    "beat": {"lease_ids": [LEASE]},
}


SEGMENT = {"name": "shoal-0", "num_slots": 1, "slot_bytes": 1 << 20, "nonce": bytes(16)}
REMOTE = {"agent": b"a", "address": 1 << 40, "num_slots": 1, "slot_bytes": 1 << 20, "nonce": bytes(16)}
STAGED = {"slot": 0, "generation": 1, "num_bytes": 1}


def test_a_staged_chunk_and_a_segment_pass() -> None:
    assert arrives("hello", GOOD["hello"] | {"segment": SEGMENT})
    assert arrives("hello", GOOD["hello"] | {"remote": REMOTE})
    assert arrives("chunk", GOOD["chunk"] | {"payload": b"", "staged": STAGED})


def arrives(name: str, values: dict[str, Any]) -> Envelope:
    if name in pb.SessionRequest.DESCRIPTOR.fields_by_name:
        return frames.from_request(pb.SessionRequest(incarnation=1, **{name: values}))
    return frames.from_response(pb.SessionResponse(incarnation=1, **{name: values}))


@pytest.mark.parametrize("name", GOOD)
def test_the_well_formed_form_of_each_malformed_frame_passes(name: str) -> None:
    assert type(arrives(name, GOOD[name]).frame).__name__.lower() == name


@pytest.mark.parametrize("lease_id", [b"", bytes(15), bytes(17)], ids=len)
@pytest.mark.parametrize("name", [name for name, values in GOOD.items() if "lease_id" in values])
def test_a_lease_id_of_another_length_is_refused(name: str, lease_id: bytes) -> None:
    with pytest.raises(ProtocolViolation, match="lease id"):
        arrives(name, GOOD[name] | {"lease_id": lease_id})


def _fields_with_presence() -> list[tuple[str, str]]:
    return [
        (name, field.name)
        for name in GOOD
        for field in pb.DESCRIPTOR.message_types_by_name[name.capitalize()].fields
        if field.has_presence and field.message_type is None
    ]


@pytest.mark.parametrize(("name", "field"), _fields_with_presence())
def test_a_field_whose_zero_means_something_must_be_set(name: str, field: str) -> None:
    values = {key: value for key, value in GOOD[name].items() if key != field}
    with pytest.raises(ProtocolViolation, match=f"{name}.{field} is not set"):
        arrives(name, values)


MALFORMED: list[tuple[str, dict[str, Any]]] = [
    ("hello", {"segment": SEGMENT | {"num_slots": 0}}),
    ("hello", {"segment": SEGMENT | {"num_slots": frames.MAX_SLOTS + 1}}),
    ("hello", {"segment": SEGMENT | {"slot_bytes": 0}}),
    ("hello", {"segment": SEGMENT | {"slot_bytes": (16 << 20) + 1}}),
    ("hello", {"segment": SEGMENT | {"nonce": bytes(15)}}),
    ("hello", {"segment": SEGMENT | {"name": "x" * 1025}}),
    ("hello", {"remote": REMOTE | {"num_slots": 0}}),
    ("hello", {"remote": REMOTE | {"num_slots": frames.MAX_SLOTS + 1}}),
    ("hello", {"remote": REMOTE | {"slot_bytes": 0}}),
    ("hello", {"remote": REMOTE | {"slot_bytes": (16 << 20) + 1}}),
    ("hello", {"remote": REMOTE | {"nonce": bytes(15)}}),
    ("hello", {"remote": REMOTE | {"agent": b""}}),
    ("hello", {"remote": REMOTE | {"agent": bytes(frames.MAX_AGENT_BYTES + 1)}}),
    ("hello", {"remote": REMOTE | {"address": 0}}),
    ("hello", {"remote": REMOTE | {"address": frames.MAX_ADDRESS + 1}}),
    ("hello", {"remote": REMOTE | {"address": (1 << 64) - 1}}),
    ("chunk", {"payload": b"", "staged": STAGED | {"slot": None}}),
    ("chunk", {"payload": b"", "staged": STAGED | {"slot": 1 << 31}}),
    ("chunk", {"payload": b"", "staged": STAGED | {"generation": 0}}),
    ("chunk", {"payload": b"", "staged": STAGED | {"num_bytes": 0}}),
    ("chunk", {"payload": b"", "staged": STAGED | {"num_bytes": (16 << 20) + 1}}),
    ("chunk", {"payload": b"p", "staged": STAGED}),
    ("hello", {"wire_modes": [pb.WIRE_MODE_UNSPECIFIED]}),
    ("hello", {"wire_modes": [77]}),
    ("hello", {"wire_modes": [pb.WIRE_MODE_KV] * 3}),
    ("hello", {"plan_hashes": ["p"] * 257}),
    ("hello", {"plan_hashes": ["p" * 1025]}),
    ("hello", {"peer": "p" * 1025}),
    ("hello", {"key": bytes(15)}),
    ("hello", {"key": bytes(17)}),
    ("beat", {"lease_ids": [LEASE, bytes(15)]}),
    ("granted", {"plan_hash": "p" * 1025}),
    ("granted", {"num_prompt_tokens": 0}),
    ("granted", {"num_prompt_tokens": frames.MAX_PROMPT_TOKENS + 1}),
    ("granted", {"num_present": 2}),
    ("granted", {"ttl_s": 0.0}),
    ("granted", {"ttl_s": math.inf}),
    ("granted", {"claim_timeout_s": 0.0}),
    ("granted", {"claim_timeout_s": math.nan}),
    ("granted", {"timeout_s": -1.0}),
    ("granted", {"request_id": "r" * 1025}),
    ("granted", {"tenant": "t" * 1025}),
    ("granted", {"attempt": 0}),
    ("granted", {"attempt": 1 << 31}),
    ("accepted", {"token_ids": []}),
    ("accepted", {"token_ids": [1, 1 << 31]}),
    ("accepted", {"num_present": 2}),
    ("accepted", {"credit_bytes": 0}),
    ("accepted", {"ttl_s": 0.0}),
    ("accepted", {"ttl_s": -1.0}),
    ("accepted", {"ttl_s": math.inf}),
    ("chunk", {"payload": b""}),
    ("chunk", {"payload": bytes((1 << 20) + 1)}),
    ("chunk", {"seq": 1 << 31}),
    ("chunk", {"token_start": 1}),
    ("chunk", {"token_start": 2}),
    ("chunk", {"token_end": 1 << 31}),
    ("chunk", {"layer_start": 1}),
    ("chunk", {"layer_end": 1 << 31}),
    ("seal", {"prompt_hash": bytes(31)}),
    ("seal", {"num_chunks": 1 << 31}),
    ("seal", {"boundary_token_id": 1 << 31}),
    ("seal", {"queue_s": math.nan}),
    ("seal", {"prefill_s": -0.5}),
    ("credit", {"num_bytes": 0}),
    ("credit", {"num_bytes": (16 << 20) + 1}),
    ("credit", {"seq": 1 << 31}),
    ("nack", {"seq": 1 << 31}),
    ("failed", {"reason": "r" * 1025}),
    ("refused", {"reason": "r" * 1025}),
    ("cancel", {"reason": "r" * 1025}),
]


@pytest.mark.parametrize(
    ("name", "change"), MALFORMED, ids=[f"{name}-{next(iter(change))}" for name, change in MALFORMED]
)
def test_a_malformed_frame_is_refused(name: str, change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolViolation):
        arrives(name, GOOD[name] | change)


def _decode_like_grpc(message_type: type[Any], data: bytes) -> Envelope | None:
    """``None`` where gRPC itself would have refused the bytes, or a frame was malformed."""
    try:
        message = message_type.FromString(data)
    except DecodeError:
        return None
    decode = frames.from_request if message_type is pb.SessionRequest else frames.from_response
    try:
        return decode(message)
    except ProtocolViolation:
        return None


_SENT = [frames.to_request(Envelope(7, frame)).SerializeToString() for frame in PREFILL_FRAMES] + [
    frames.to_response(Envelope(7, frame)).SerializeToString() for frame in DECODE_FRAMES
]


@given(st.sampled_from(_SENT), st.data())
def test_damaged_frames_raise_nothing_else_and_what_passes_is_in_bounds(sent: bytes, data: st.DataObject) -> None:
    damaged = bytearray(sent)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    for message_type in (pb.SessionRequest, pb.SessionResponse):
        envelope = _decode_like_grpc(message_type, bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))
        if envelope is None:
            continue
        assert envelope.incarnation > 0
        assert len(getattr(envelope.frame, "lease_id", LEASE)) == 16
        if isinstance(envelope.frame, Chunk):
            assert 0 <= envelope.frame.token_start < envelope.frame.token_end <= MAX_ID
            assert 0 < envelope.frame.num_bytes <= frames.MAX_STAGED_BYTES
