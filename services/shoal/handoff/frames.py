"""Cuts K/V into pieces that fit the wire."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shoal.errors import InternalError
from shoal.model.kv_rows import KvRows
from shoal.wire.handoff_messages import Chunk, StagedPayload, WireMode


@dataclass(frozen=True, slots=True)
class Piece:
    """What a ``Chunk`` says, of a payload that is still where it was made."""

    lease_id: bytes
    seq: int
    token_start: int
    token_end: int
    layer_start: int
    layer_end: int
    payload: bytes | memoryview | KvRows
    wire_mode: WireMode = WireMode.KV

    @property
    def num_bytes(self) -> int:
        return len(self.payload)

    def loaded(self, payload: bytes | memoryview, crc32c: int, staged: StagedPayload | None = None) -> Chunk:
        """As it travels, with its ``payload`` or the place where it was ``staged``."""
        return Chunk(
            self.lease_id, self.seq, self.token_start, self.token_end, self.layer_start, self.layer_end, crc32c,
            payload, staged, self.wire_mode,
        )  # fmt: skip


def cut(
    lease_id: bytes,
    first_seq: int,
    tokens: tuple[int, int],
    layers: tuple[int, int],
    payload: memoryview | KvRows,
    max_frame_bytes: int,
    wire_mode: WireMode = WireMode.KV,
    *,
    gather: bool = False,
) -> Iterator[Piece]:
    """Pieces of at most ``max_frame_bytes`` that tile ``tokens`` x ``layers``, numbered from ``first_seq``.

    ``payload`` is ``[layers, tokens, bytes of a token in a layer]``: rows of a pool, or bytes in C order, in which
    whole layers are one run, and tokens of one layer, too. Pieces are views of it. ``gather``: as few as can be, where
    rows cost no more for that, and what is no run of bytes is copied together.
    With HIDDEN it's ``[tokens, bytes of a state]``, and each piece is for all of the layers.
    """
    is_hidden = wire_mode is WireMode.HIDDEN
    num_tokens, num_layers = tokens[1] - tokens[0], 1 if is_hidden else layers[1] - layers[0]
    data = payload if isinstance(payload, KvRows) else payload.cast("B")
    if num_tokens <= 0 or num_layers <= 0 or not len(data) or len(data) % (num_tokens * num_layers):
        raise InternalError(f"{len(data)} bytes can't be K/V of {num_tokens} tokens in {num_layers} layers")
    token_bytes = len(data) // (num_tokens * num_layers)
    max_cells = max_frame_bytes // token_bytes
    if max_cells == 0:
        raise InternalError(f"a token's K/V in one layer is {token_bytes} bytes, a frame {max_frame_bytes}: allow more")
    layer_step, token_step = _tile(num_layers, num_tokens, max_cells, gather=gather)
    for layer in range(0, num_layers, layer_step):
        layer_end = min(layer + layer_step, num_layers)
        for token in range(0, num_tokens, token_step):
            token_end = min(token + token_step, num_tokens)
            yield Piece(
                lease_id,
                first_seq,
                token_start=tokens[0] + token,
                token_end=tokens[0] + token_end,
                layer_start=layers[0] + layer,
                layer_end=layers[1] if is_hidden else layers[0] + layer_end,
                payload=_part(data, slice(layer, layer_end), slice(token, token_end), num_tokens, token_bytes),
                wire_mode=wire_mode,
            )
            first_seq += 1


def _part(
    data: memoryview | KvRows, layers: slice, tokens: slice, num_tokens: int, token_bytes: int
) -> bytes | memoryview | KvRows:
    if isinstance(data, KvRows):
        return data.part(layers, tokens)
    size = (tokens.stop - tokens.start) * token_bytes
    starts = [(layer * num_tokens + tokens.start) * token_bytes for layer in range(layers.start, layers.stop)]
    if len(starts) == 1 or tokens.stop - tokens.start == num_tokens:
        return data[starts[0] : starts[-1] + size]
    return b"".join(data[start : start + size] for start in starts)


def _tile(num_layers: int, num_tokens: int, max_cells: int, *, gather: bool) -> tuple[int, int]:
    """Layers and tokens of a tile of at most ``max_cells``; with ``gather`` one of which the fewest cover all."""
    if not gather:
        return max(1, max_cells // num_tokens), min(num_tokens, max_cells)
    best, fewest = (1, 1), num_layers * num_tokens + 1
    num_parts = -(-num_tokens // max_cells)
    while num_parts < fewest and num_parts <= num_tokens:
        token_step = -(-num_tokens // num_parts)
        layer_step = min(num_layers, max_cells // token_step)
        num_tiles = -(-num_layers // layer_step) * -(-num_tokens // token_step)
        if num_tiles < fewest:
            best, fewest = (layer_step, token_step), num_tiles
        num_parts += 1
    return best
