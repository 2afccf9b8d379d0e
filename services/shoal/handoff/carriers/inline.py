"""Payload in the frame itself: always possible."""

from __future__ import annotations

import numpy as np

from shoal.backends.cpu.copying import Copier
from shoal.handoff.base import crc32c
from shoal.handoff.frames import Piece
from shoal.model.kv_rows import KvRows
from shoal.wire.handoff_messages import Chunk


class InlineLoader:
    """Prefill's end. Decode's has nothing to do: what a channel delivers is nobody else's memory."""

    has_room = True
    lent_to: tuple[bytes, ...] = ()
    gathers = True

    def __init__(self, max_bytes: int, copier: Copier | None = None) -> None:
        self.max_bytes = max_bytes
        self._copier = copier or Copier()

    def load(self, piece: Piece) -> Chunk:
        if isinstance(piece.payload, KvRows):
            gathered = np.empty(piece.num_bytes, np.uint8)
            crc = self._copier.gather(piece.payload.layers, piece.payload.at, gathered)
            return piece.loaded(gathered.data, crc)
        payload = bytes(piece.payload)
        return piece.loaded(payload, crc32c(payload))

    def credited(self, lease_id: bytes, seq: int) -> None: ...

    def ended(self, lease_id: bytes) -> None: ...

    def close(self) -> None: ...
