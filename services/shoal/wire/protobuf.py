"""The bytes of what prefill sends: protobuf's own, of a payload with fewer copies than protobuf makes.

protobuf copies a payload into a message, and out of it to the wire; at the other end into a message, and out of that
each time somebody asks. Here it's joined to the bytes of all else, and found in them again. Fields of a message may
stand in any order, so whoever knows handoff.proto reads what comes from here, and is read.
"""

from __future__ import annotations

import enum
from dataclasses import replace

from google.protobuf.message import DecodeError, Message

from shoal.errors import ProtocolViolation
from shoal.v1 import handoff_pb2 as pb
from shoal.wire.frames import check_payload, from_request, to_request
from shoal.wire.handoff_messages import Chunk, Envelope


class _WireType(enum.IntEnum):
    """How a field's value is written; what else there is, protobuf parses."""

    VARINT = 0
    FIXED64 = 1
    LENGTH = 2
    FIXED32 = 5


_FIXED64_BYTES, _FIXED32_BYTES = 8, 4
_MAX_HEAD_BYTES = 256
"""Of a chunk before its payload; Shoal's have at most a hundred. What is longer, protobuf parses."""
_MAX_VARINT_BYTES = 10


def _tag(message: type[Message], name: str, wire_type: _WireType) -> int:
    """What a field begins with: one byte, for numbers below 16."""
    number: int = message.DESCRIPTOR.fields_by_name[name].number
    return number << 3 | wire_type


_INCARNATION = _tag(pb.SessionRequest, "incarnation", _WireType.FIXED64)
_CHUNK = _tag(pb.SessionRequest, "chunk", _WireType.LENGTH)
_PAYLOAD = _tag(pb.Chunk, "payload", _WireType.LENGTH)
_BEFORE_CHUNK = 1 + _FIXED64_BYTES
"""An incarnation."""


def serialize(envelope: Envelope) -> bytes:
    """A ``SessionRequest``. Raises ProtocolViolation for what doesn't fit one."""
    chunk = envelope.frame
    if not (isinstance(chunk, Chunk) and chunk.payload):
        return to_request(envelope).SerializeToString()
    check_payload(chunk)
    head = to_request(replace(envelope, frame=replace(chunk, payload=b"")))
    of_chunk = b"".join((head.chunk.SerializeToString(), bytes((_PAYLOAD,)), _to_varint(len(chunk.payload))))
    head.ClearField("chunk")
    num_bytes = _to_varint(len(of_chunk) + len(chunk.payload))
    return b"".join((head.SerializeToString(), bytes((_CHUNK,)), num_bytes, of_chunk, chunk.payload))


def parse(data: bytes) -> Envelope:
    """What ``data`` says, whoever wrote it; a payload may be a view of it. Raises ProtocolViolation unless it's well
    formed."""
    place = _find_payload(data)
    payload = None
    try:
        if place is None:
            request = pb.SessionRequest.FromString(data)
        else:
            chunk_at, head_end, payload_at = place
            request = pb.SessionRequest.FromString(data[:_BEFORE_CHUNK])
            request.chunk.MergeFromString(data[chunk_at:head_end])
            payload = memoryview(data)[payload_at:]
    except (DecodeError, ValueError) as error:  # protobuf without its C code says UnicodeDecodeError, too
        raise ProtocolViolation(f"{len(data)} bytes that are no frame") from error
    return from_request(request, payload)


def _find_payload(data: bytes) -> tuple[int, int, int] | None:
    """Where a chunk begins, where its payload's field does, and where the payload.

    ``None`` for any other frame, and for a chunk that isn't the last thing in ``data``, or its payload not the last in
    the chunk.
    """
    if len(data) <= _BEFORE_CHUNK or (data[0], data[_BEFORE_CHUNK]) != (_INCARNATION, _CHUNK):
        return None
    try:
        num_bytes, at = _from_varint(data, _BEFORE_CHUNK + 1)
        if at + num_bytes != len(data):
            return None
        chunk_at = at
        while at - chunk_at < _MAX_HEAD_BYTES:
            if data[at] == _PAYLOAD:
                num_bytes, payload_at = _from_varint(data, at + 1)
                return (chunk_at, at, payload_at) if payload_at + num_bytes == len(data) else None
            tag, at = _from_varint(data, at)
            at = _after(data, at, tag & 7)
    except (IndexError, ValueError):  # protobuf says what is wrong
        return None
    return None


def _after(data: bytes, at: int, wire_type: int) -> int:
    """Where the value at ``at`` ends. Raises IndexError or ValueError."""
    match wire_type:
        case _WireType.VARINT:
            return _from_varint(data, at)[1]
        case _WireType.FIXED64:
            return at + _FIXED64_BYTES
        case _WireType.LENGTH:
            num_bytes, at = _from_varint(data, at)
            return at + num_bytes
        case _WireType.FIXED32:
            return at + _FIXED32_BYTES
    raise ValueError(f"a field of wire type {wire_type}")


def _to_varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last say that there are more."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _from_varint(data: bytes, at: int) -> tuple[int, int]:
    """A value, and where it ends. Raises IndexError where ``data`` does, ValueError where it's too long."""
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        value |= (data[at + index] & 0x7F) << 7 * index
        if data[at + index] <= 0x7F:
            return value, at + index + 1
    raise ValueError("a number of more than 64 bits")
