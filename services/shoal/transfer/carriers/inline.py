"""Payload in the frame itself: always possible."""

from __future__ import annotations

from dataclasses import replace

from shoal.messages import Chunk
from shoal.transfer.base import crc32c


class InlineLoader:
    """Prefill's end. Decode's has nothing to do: what a channel delivers is nobody else's memory."""

    has_room = True
    gathers = True

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes

    def load(self, chunk: Chunk) -> Chunk:
        payload = bytes(chunk.payload)
        return replace(chunk, payload=payload, crc32c=crc32c(payload))

    def credited(self, lease_id: bytes, seq: int) -> None: ...

    def ended(self, lease_id: bytes) -> None: ...

    def close(self) -> None: ...
