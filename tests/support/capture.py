"""All traffic of a network, kept while a program runs in it, and what of it could be read.

``python capture.py FOLDER COMMAND…`` runs a command and keeps what passes the loopback interface meanwhile: each frame
in FOLDER/frames after its length, and in FOLDER/dropped how many the kernel had no room for. It needs CAP_NET_RAW,
which whoever makes a network namespace has in it (netns.py).
"""

from __future__ import annotations

import contextlib
import json
import pickle  # to know the forms that ids have in it; nothing is loaded
import signal
import socket
import struct
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_ETH_P_ALL = 3
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_SO_RCVBUFFORCE = 33
"""Beyond what an administrator allows others."""
_MAX_FRAME_BYTES = 1 << 18
_BUFFER_BYTES = 256 << 20
_LENGTH = struct.Struct("<I")
_LOOK_S = 0.2


# --- keeping --------------------------------------------------------------------------------------------


def main() -> None:
    folder = Path(sys.argv[1])
    with (
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL)) as wire,
        (folder / "frames").open("wb", buffering=0) as frames,
    ):
        wire.bind(("lo", 0))
        for option in (socket.SO_RCVBUF, _SO_RCVBUFFORCE):
            with contextlib.suppress(PermissionError):
                wire.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        wire.settimeout(_LOOK_S)
        child = subprocess.Popen(sys.argv[2:])
        signal.signal(signal.SIGTERM, lambda number, _frame: child.send_signal(number))
        while child.poll() is None:
            try:
                frame, address = wire.recvfrom(_MAX_FRAME_BYTES)
            except TimeoutError:
                continue
            if address[2] != socket.PACKET_OUTGOING:  # loopback shows each twice
                frames.write(_LENGTH.pack(len(frame)) + frame)
        _, dropped = struct.unpack("II", wire.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        (folder / "dropped").write_text(str(dropped), encoding="ascii")
    sys.exit(child.returncode)


# --- reading --------------------------------------------------------------------------------------------


class Flow(NamedTuple):
    """One direction of a conversation, by its ports."""

    source: int
    target: int


@dataclass(frozen=True)
class Traffic:
    """What was sent, put together: of TCP the bytes of each connection in their order."""

    by_flow: Mapping[Flow, bytes]

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.by_flow.values()))

    def where(self, needles: Sequence[bytes]) -> dict[Flow, bytes]:
        """The flows that hold one of ``needles``, and which."""
        found = {}
        for flow, data in self.by_flow.items():
            hit = next((needle for needle in needles if needle in data), None)
            if hit is not None:
                found[flow] = hit
        return found


def read(folder: Path) -> Traffic:
    """Raises AssertionError if frames are missing."""
    assert (folder / "dropped").read_text(encoding="ascii") == "0", "the capture has gaps"
    segments: defaultdict[Flow, list[dict[int, bytes]]] = defaultdict(lambda: [{}])
    others: defaultdict[Flow, bytearray] = defaultdict(bytearray)
    for frame in _frames((folder / "frames").read_bytes()):
        packet, protocol = _transport(frame)
        if protocol == socket.IPPROTO_TCP:
            source, target, number = struct.unpack_from("!HHI", packet)
            connections = segments[Flow(source, target)]
            if packet[13] & 2 and connections[-1]:  # SYN: another connection between the same ports
                connections.append({})
            payload = packet[(packet[12] >> 4) * 4 :]
            if len(payload) > len(connections[-1].get(number, b"")):
                connections[-1][number] = payload
        else:
            source, target = struct.unpack_from("!HH", packet) if protocol == socket.IPPROTO_UDP else (0, 0)
            others[Flow(source, target)] += packet
    whole = {flow: b"".join(map(_in_order, connections)) for flow, connections in segments.items()}
    return Traffic(whole | {flow: whole.get(flow, b"") + bytes(data) for flow, data in others.items()})


def _frames(data: bytes) -> Iterator[bytes]:
    """Without a last one that isn't whole."""
    start = 0
    while start + _LENGTH.size <= len(data):
        (num_bytes,) = _LENGTH.unpack_from(data, start)
        start += _LENGTH.size
        if start + num_bytes <= len(data):
            yield data[start : start + num_bytes]
        start += num_bytes


def _transport(frame: bytes) -> tuple[bytes, int]:
    """A packet's contents and their protocol; as it is, if it isn't IP."""
    (kind,) = struct.unpack_from("!H", frame, 12)
    packet = frame[14:]
    if kind == 0x0800:
        (num_bytes,) = struct.unpack_from("!H", packet, 2)
        return packet[(packet[0] & 15) * 4 : num_bytes or None], packet[9]
    if kind == 0x86DD:
        return packet[40:], packet[6]
    return packet, -1


def _in_order(segments: Mapping[int, bytes]) -> bytes:
    """By sequence number, which wraps around, and without what was sent again."""
    if not segments:
        return b""
    first = next(iter(segments))
    data, end = bytearray(), None
    for number in sorted(segments, key=lambda number: (number - first + (1 << 31)) % (1 << 32)):
        payload = segments[number]
        again = 0 if end is None else max(0, (end - number + (1 << 31)) % (1 << 32) - (1 << 31))
        data += payload[again:]
        end = (number + max(len(payload), again)) % (1 << 32)
    return bytes(data)


# --- looking --------------------------------------------------------------------------------------------


def forms(token_ids: Sequence[int], window: int = 6) -> list[bytes]:
    """Pieces of the ids in every encoding that could appear; short ones, since a message may be cut in two."""
    assert len(token_ids) >= window
    found = []
    for start in range(0, len(token_ids) - window + 1, window):
        ids = token_ids[start : start + window]
        found += [struct.pack(f"{order}{window}{kind}", *ids) for order in "<>" for kind in "Hiq"]
        found += [
            b"".join(map(_varint, ids)),
            json.dumps(list(ids))[1:-1].encode(),
            json.dumps(list(ids), separators=(",", ":"))[1:-1].encode(),
            b"".join(map(_pickled, ids)),
            b"".join(map(_packed, ids)),
        ]
    return found


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])


def _pickled(value: int) -> bytes:
    """Between the protocol's number, or what frames it, and the end."""
    return pickle.dumps(value, protocol=2)[2:-1]


def _packed(value: int) -> bytes:
    """MessagePack, Ray's own outermost form."""
    if value < 128:
        return bytes([value])
    return bytes([0xCC, value]) if value < 256 else struct.pack(">BH", 0xCD, value)


if __name__ == "__main__":
    main()
