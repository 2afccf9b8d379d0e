"""What a capture is read with: connections are put together, and ids are found in whatever form they have."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from capture import Flow, forms, read

from shoal.v1 import handoff_pb2, worker_pb2
from shoal.wire.handoff_messages import Accepted

IDS = (1017, 42, 7, 300, 49_151, 128, 255, 256, 11, 20_000, 5, 1)
OTHERS = (1017, 42, 7, 300, 49_150, 128, 255, 256, 12, 20_000, 5, 1)

THERE, BACK = Flow(1000, 2000), Flow(2000, 1000)


def segment(number: int, payload: bytes, flags: int = 0x10, flow: Flow = THERE) -> bytes:
    tcp = struct.pack("!HHIIBBHHH", *flow, number % (1 << 32), 0, 5 << 4, flags, 0, 0, 0) + payload
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0, b"\x7f\0\0\1", b"\x7f\0\0\1")
    return bytes(12) + b"\x08\0" + ip + tcp


def captured(folder: Path, *frames: bytes, rest: bytes = b"", dropped: int = 0) -> Path:
    (folder / "frames").write_bytes(b"".join(struct.pack("<I", len(frame)) + frame for frame in frames) + rest)
    (folder / "dropped").write_text(str(dropped), encoding="ascii")
    return folder


@pytest.mark.parametrize("first", [5, (1 << 32) - 3], ids=["plain", "numbers that wrap around"])
def test_a_connection_is_put_together_whatever_its_order(tmp_path: Path, first: int):
    folder = captured(
        tmp_path,
        segment(first, b"abc"),
        segment(first + 6, b"ghi"),
        segment(first + 3, b"def"),
        segment(first, b"abc"),  # sent again
        segment(first + 2, b"cdefg"),  # again, cut otherwise
    )
    assert read(folder).by_flow == {THERE: b"abcdefghi"}


def test_connections_between_the_same_ports_follow_one_another(tmp_path: Path):
    folder = captured(
        tmp_path, segment(1, b"", 2), segment(2, b"one"), segment(900, b"", 2), segment(901, b"two"), rest=b"cut"
    )
    assert read(folder).by_flow == {THERE: b"onetwo"}


def test_directions_are_apart(tmp_path: Path):
    folder = captured(tmp_path, segment(1, b"there"), segment(1, b"back", flow=BACK))
    assert read(folder).where([b"back"]) == {BACK: b"back"}


def test_a_capture_with_gaps_shows_nothing(tmp_path: Path):
    with pytest.raises(AssertionError, match="gaps"):
        read(captured(tmp_path, segment(1, b"abc"), dropped=1))


WRITERS: dict[str, Callable[[Sequence[int]], bytes]] = {
    "protobuf": lambda ids: worker_pb2.SubmitRequest(prompt_token_ids=ids).SerializeToString(),
    "the hand-off's": lambda ids: handoff_pb2.Accepted(token_ids=ids).SerializeToString(),
    "a pickled message": lambda ids: pickle.dumps(Accepted(b"1" * 16, tuple(ids), 0, 1, 1.0)),
    "a pickled list": lambda ids: pickle.dumps(list(ids)),
    "JSON": lambda ids: json.dumps(list(ids)).encode(),
    "tight JSON": lambda ids: json.dumps(list(ids), separators=(",", ":")).encode(),
    "32 bits": lambda ids: struct.pack(f"<{len(ids)}i", *ids),
    "64 bits": lambda ids: struct.pack(f"<{len(ids)}q", *ids),
    "16 bits": lambda ids: struct.pack(f"<{len(ids)}H", *ids),
    "64 bits, big end first": lambda ids: struct.pack(f">{len(ids)}q", *ids),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_ids_are_found_in_each_form_and_others_are_not(write: Callable[[Sequence[int]], bytes]):
    assert any(form in write(IDS) for form in forms(IDS))
    assert not any(form in write(OTHERS) for form in forms(IDS))
