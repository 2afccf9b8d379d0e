"""The bytes of frames: protobuf's own, whoever wrote or reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ProtocolViolation
from shoal.v1 import handoff_pb2 as pb
from shoal.wire.frames import MAX_PAYLOAD_BYTES, from_request, to_request
from shoal.wire.handoff_messages import (
    Beat,
    Chunk,
    Claim,
    Committed,
    Draining,
    Envelope,
    Failed,
    Frame,
    Hello,
    Seal,
    StagedPayload,
    WireMode,
)
from shoal.wire.protobuf import parse, serialize
from shoal.wire.values import MAX_ID

INCARNATION = (1 << 64) - 1
LEASE = bytes(range(16))
CHUNK = Chunk(LEASE, 3, 0, 512, 20, 30, 0xFFFF_FFFF, b"payload" * 99, wire_mode=WireMode.HIDDEN)
HEAD = to_request(Envelope(1, CHUNK)).chunk.SerializeToString().replace(b"\x42\xb5\x05" + CHUNK.payload, b"")
"""All of the chunk but its payload."""
FRAMES: tuple[Frame, ...] = (
    Hello(2, ("plan",)),
    Claim(LEASE),
    CHUNK,
    replace(CHUNK, payload=b"", staged=StagedPayload(0, 1, 5)),
    Seal(LEASE, 1, bytes(32), 0, 0.0, 0.25),
    Failed(LEASE, "out of blocks"),
    Draining(),
    Beat(),
)

edges = st.tuples(st.integers(0, MAX_ID - 1), st.integers(1, MAX_ID)).filter(lambda pair: pair[0] < pair[1])
chunks = st.builds(
    lambda seq, tokens, layers, crc, payload, mode: Chunk(LEASE, seq, *tokens, *layers, crc, payload, wire_mode=mode),
    st.integers(0, MAX_ID),
    edges,
    edges,
    st.integers(0, (1 << 32) - 1),
    st.binary(min_size=1, max_size=300) | st.sampled_from([bytes(127), bytes(128), bytes(16383), bytes(16384)]),
    st.sampled_from(WireMode),
)


def by_protobuf(data: bytes) -> Envelope | None:
    """What generated code makes of it; ``None`` if it isn't to be taken."""
    try:
        return from_request(pb.SessionRequest.FromString(data))
    except (DecodeError, ProtocolViolation):
        return None


def by_us(data: bytes) -> Envelope | None:
    try:
        return parse(data)
    except ProtocolViolation:
        return None


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: type(frame).__name__)
def test_every_frame_is_the_message_that_protobuf_would_send(frame: Frame) -> None:
    envelope = Envelope(INCARNATION, frame)
    data = serialize(envelope)
    assert pb.SessionRequest.FromString(data) == to_request(envelope)
    assert parse(data) == parse(to_request(envelope).SerializeToString()) == envelope


@given(chunk=chunks)
def test_any_chunk_is_read_by_protobuf_and_back(chunk: Chunk) -> None:
    envelope = Envelope(1, chunk)
    assert by_protobuf(serialize(envelope)) == parse(serialize(envelope)) == envelope


def test_a_payload_is_a_view_of_what_arrived() -> None:
    data = serialize(Envelope(1, replace(CHUNK, payload=bytes(MAX_PAYLOAD_BYTES))))
    chunk = parse(data).frame
    assert isinstance(chunk, Chunk)
    assert isinstance(chunk.payload, memoryview)
    assert chunk.payload.obj is data
    assert len(chunk.payload) == MAX_PAYLOAD_BYTES


@pytest.mark.parametrize(
    "frame",
    [replace(CHUNK, payload=bytes(MAX_PAYLOAD_BYTES + 1)), replace(CHUNK, seq=-1), Committed(LEASE)],
    ids=["payload", "number", "side"],
)
def test_what_does_not_fit_is_not_sent(frame: Frame) -> None:
    with pytest.raises(ProtocolViolation):
        serialize(Envelope(1, frame))


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (replace(CHUNK, payload=bytes(MAX_PAYLOAD_BYTES + 1)), "1048577 bytes"),
        (replace(CHUNK, staged=StagedPayload(0, 1, 5)), "names a staging slot, too"),
        (replace(CHUNK, token_end=0), "empty or out of bounds"),
        (replace(CHUNK, lease_id=b"short"), "has 16 bytes, not 5"),
    ],
    ids=["too large", "staged, too", "empty range", "lease id"],
)
def test_what_is_not_well_formed_is_refused_though_its_payload_is_found(frame: Chunk, why: str) -> None:
    good = serialize(Envelope(1, replace(CHUNK, payload=b"x")))
    body = pb.Chunk(
        lease_id=frame.lease_id, seq=frame.seq, token_start=frame.token_start, token_end=frame.token_end,
        layer_start=frame.layer_start, layer_end=frame.layer_end, crc32c=frame.crc32c, wire_mode=pb.WIRE_MODE_KV,
        staged=frame.staged and pb.StagedPayload(slot=0, generation=1, num_bytes=5),
    ).SerializeToString()  # fmt: skip
    in_chunk = body + field(8, bytes(frame.payload))
    with pytest.raises(ProtocolViolation, match=why):
        parse(good[:9] + field(4, in_chunk))


@given(data=st.data())
def test_fields_in_any_order_mean_what_protobuf_says(data: st.DataObject) -> None:
    """Also twice, where the last one counts, unknown ones, and others behind the payload."""
    body = pb.Chunk(
        lease_id=LEASE, seq=0, token_start=0, token_end=4, layer_start=0, layer_end=2, crc32c=7,
        wire_mode=pb.WIRE_MODE_KV,
    )  # fmt: skip
    in_chunk = [field(8, b"first"), field(8, b"second"), field(40, b"unknown"), b"\x28\x01", body.SerializeToString()]
    parts = data.draw(st.permutations(in_chunk).flatmap(some_of))
    incarnation = pb.SessionRequest(incarnation=9).SerializeToString()
    beat = pb.SessionRequest(beat=pb.Beat()).SerializeToString()
    frames = data.draw(st.permutations([incarnation, field(4, b"".join(parts)), beat]).flatmap(some_of))
    whole = b"".join(frames)
    assert by_us(whole) == by_protobuf(whole)


@given(data=st.data())
def test_what_is_damaged_means_what_protobuf_says(data: st.DataObject) -> None:
    whole = bytearray(serialize(Envelope(1, replace(CHUNK, payload=b"0123456789" * 20))))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 80))
        match data.draw(st.sampled_from(["change", "drop", "insert", "cut"])):
            case "change":
                whole[at] = data.draw(st.integers(0, 255))
            case "drop":
                del whole[at]
            case "insert":
                whole.insert(at, data.draw(st.integers(0, 255)))
            case "cut":
                del whole[len(whole) - data.draw(st.integers(0, 5)) :]
    assert by_us(bytes(whole)) == by_protobuf(bytes(whole))


UNKNOWN = {
    "varint": b"\xc0\x02" + b"\xff" * 9 + b"\x01",
    "64 bits": b"\xc1\x02" + b"\x42" * 8,
    "bytes": b"\xc2\x02" + b"\x05" + b"\x42\x01xyz",
    "32 bits": b"\xc5\x02" + b"\x42" * 4,
}
"""Fields 40, which no chunk has."""


@pytest.mark.parametrize("unknown", UNKNOWN.values(), ids=UNKNOWN)
def test_a_payload_is_found_behind_fields_of_a_later_version(unknown: bytes) -> None:
    found = parse(request_of(unknown + HEAD, b"payload")).frame
    assert isinstance(found, Chunk)
    assert isinstance(found.payload, memoryview)
    assert found == replace(CHUNK, payload=b"payload")


@pytest.mark.parametrize(
    "rest",
    [
        b"\xc3\x02" + b"\xc4\x02" + b"\x42\x07",
        b"\xc0\x02" + b"\xff" * 10 + b"\x01" + b"\x42\x07",
        b"\xc6\x02" + b"\x42\x07",
        b"\xc2\x02" + b"\xff" * 9 + b"\x42\x07",
        b"\x00\x00" + b"\x42\x07",
        b"\xc2\x80\x00" + b"\x07",
        b"\xc2\x80\x80\x80\x80\x00" + b"\x07",
        b"\x40" + b"\x07",
        b"\x41" + b"\x07",
        b"\x45" + b"\x07",
    ],
    ids=[
        "group",
        "more than 64 bits",
        "no wire type",
        "ends",
        "field 0",
        "long tag",
        "longest tag",
        "varint",
        "64",
        "32",
    ],
)
def test_what_is_odd_before_a_payload_or_where_it_begins_is_protobufs_to_judge(rest: bytes) -> None:
    whole = pb.SessionRequest(incarnation=1).SerializeToString() + field(4, HEAD + rest + b"payload")
    assert by_us(whole) == by_protobuf(whole)


def test_what_comes_before_a_chunk_may_be_a_field_of_a_later_version() -> None:
    """Though in the midst of it there are bytes as a chunk and its payload begin with."""
    rest = pb.SessionRequest(incarnation=1).SerializeToString() + field(4, HEAD + field(8, b"payload"))
    whole = bytearray(field(15, bytes(20)) + rest)
    whole[9] = 0x22
    whole[10] = len(whole) - 11
    whole[11] = 0x42
    whole[12] = len(whole) - 13
    found = by_protobuf(bytes(whole))
    assert found is not None
    assert by_us(bytes(whole)) == found


@pytest.mark.parametrize("change", [-1, 1], ids=["shorter", "longer"])
def test_a_chunk_is_as_long_as_it_says(change: int) -> None:
    whole = bytearray(request_of(HEAD, b"payload"))
    assert whole[10] < 0x7F
    whole[10] += change
    with pytest.raises(ProtocolViolation, match="no frame"):
        parse(bytes(whole))


def test_another_frames_field_is_no_payload() -> None:
    """Of a later version's Claim, of which this one knows the first field."""
    claim = pb.Claim(lease_id=LEASE).SerializeToString() + field(8, b"for later")
    assert parse(pb.SessionRequest(incarnation=1).SerializeToString() + field(3, claim)).frame == Claim(LEASE)


def test_a_long_head_is_left_to_protobuf() -> None:
    """A byte at a time in Python would hold up the event loop."""
    found = parse(request_of(field(40, b"") * 300 + HEAD, b"payload")).frame
    assert isinstance(found, Chunk)
    assert isinstance(found.payload, bytes)
    assert found == replace(CHUNK, payload=b"payload")


def request_of(head: bytes, payload: bytes) -> bytes:
    """A chunk whose payload comes last, and ``head`` before it."""
    return pb.SessionRequest(incarnation=1).SerializeToString() + field(4, head + field(8, payload))


def field(number: int, value: bytes) -> bytes:
    """A field of bytes, as the wire has it."""
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    found = []
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def some_of(parts: Sequence[bytes]) -> st.SearchStrategy[list[bytes]]:
    """Some of them, in their order."""
    return st.lists(st.booleans(), min_size=len(parts), max_size=len(parts)).map(
        lambda kept: [part for part, is_kept in zip(parts, kept, strict=True) if is_kept]
    )
