"""Cuts a chunk of K/V into frames that fit the wire."""

from __future__ import annotations

from collections.abc import Iterator

from shoal.errors import InternalError
from shoal.messages import Chunk, WireMode


def cut(
    lease_id: bytes,
    first_seq: int,
    tokens: tuple[int, int],
    layers: tuple[int, int],
    payload: memoryview,
    max_frame_bytes: int,
    wire_mode: WireMode = WireMode.KV,
    *,
    gather: bool = False,
) -> Iterator[Chunk]:
    """Chunks of at most ``max_frame_bytes`` that tile ``tokens`` x ``layers``, numbered from ``first_seq``.

    ``payload`` is ``[layers, tokens, bytes of a token in a layer]`` in C order, in which whole layers are one run of
    bytes, and tokens of one layer, too: theirs are views of it, still without a checksum, which whoever copies them
    takes. ``gather``: as few as can be, and what is no run is copied together.
    With HIDDEN it's ``[tokens, bytes of a state]``, and each chunk is for all of the layers.
    """
    is_hidden = wire_mode is WireMode.HIDDEN
    num_tokens, num_layers = tokens[1] - tokens[0], 1 if is_hidden else layers[1] - layers[0]
    if num_tokens <= 0 or num_layers <= 0 or payload.nbytes == 0 or payload.nbytes % (num_tokens * num_layers):
        raise InternalError(f"{payload.nbytes} bytes can't be K/V of {num_tokens} tokens in {num_layers} layers")
    data = payload.cast("B")
    token_bytes = data.nbytes // (num_tokens * num_layers)
    max_cells = max_frame_bytes // token_bytes
    if max_cells == 0:
        raise InternalError(f"a token's K/V in one layer is {token_bytes} bytes, a frame {max_frame_bytes}: allow more")
    layer_step, token_step = _tile(num_layers, num_tokens, max_cells, gather=gather)
    for layer in range(0, num_layers, layer_step):
        layer_end = min(layer + layer_step, num_layers)
        for token in range(0, num_tokens, token_step):
            token_end = min(token + token_step, num_tokens)
            starts = [(of_layer * num_tokens + token) * token_bytes for of_layer in range(layer, layer_end)]
            size = (token_end - token) * token_bytes
            if len(starts) == 1 or token_end - token == num_tokens:
                part: bytes | memoryview = data[starts[0] : starts[-1] + size]
            else:
                part = b"".join(data[start : start + size] for start in starts)
            seq = first_seq
            first_seq += 1
            yield Chunk(
                lease_id,
                seq,
                token_start=tokens[0] + token,
                token_end=tokens[0] + token_end,
                layer_start=layers[0] + layer,
                layer_end=layers[1] if is_hidden else layers[0] + layer_end,
                crc32c=0,
                payload=part,
                wire_mode=wire_mode,
            )


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
