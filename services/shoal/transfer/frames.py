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
) -> Iterator[Chunk]:
    """Chunks of at most ``max_frame_bytes`` that tile ``tokens`` x ``layers``, numbered from ``first_seq``.

    ``payload`` is ``[layers, tokens, bytes of a token in a layer]`` in C order, so that both whole layers and a range
    of tokens in one layer are runs of it: whole layers if one fits a frame, else parts of each. Theirs are views of it,
    still without a checksum, which whoever copies them takes.
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
    layer_step = max(1, max_cells // num_tokens)
    token_step = num_tokens if layer_step > 1 else min(num_tokens, max_cells)
    for layer in range(0, num_layers, layer_step):
        layer_end = min(layer + layer_step, num_layers)
        for token in range(0, num_tokens, token_step):
            token_end = min(token + token_step, num_tokens)
            start = (layer * num_tokens + token) * token_bytes
            size = (layer_end - layer) * (token_end - token) * token_bytes
            part = data[start : start + size]
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
