from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import InternalError
from shoal.handoff.frames import cut
from shoal.model.kv_rows import KvRows


@given(
    num_tokens=st.integers(1, 20),
    num_layers=st.integers(1, 6),
    token_bytes=st.integers(1, 9),
    max_frame_bytes=st.integers(9, 400),
    gather=st.booleans(),
)
def test_the_pieces_put_together_are_the_whole(
    num_tokens: int, num_layers: int, token_bytes: int, max_frame_bytes: int, gather: bool
) -> None:
    whole = np.random.default_rng(0).integers(1, 256, (num_layers, num_tokens, token_bytes), dtype=np.uint8)
    tokens, layers = (7, 7 + num_tokens), (2, 2 + num_layers)
    pieces = list(cut(b"id", 5, tokens, layers, memoryview(whole), max_frame_bytes, gather=gather))

    rebuilt = np.zeros_like(whole)
    for piece in pieces:
        at = (slice(piece.layer_start - 2, piece.layer_end - 2), slice(piece.token_start - 7, piece.token_end - 7))
        assert not rebuilt[at].any()
        rebuilt[at] = np.frombuffer(piece.payload, np.uint8).reshape(rebuilt[at].shape)
        assert len(piece.payload) <= max_frame_bytes
    np.testing.assert_array_equal(rebuilt, whole)
    assert [piece.seq for piece in pieces] == list(range(5, 5 + len(pieces)))


@given(num_tokens=st.integers(1, 20), num_layers=st.integers(1, 6), max_cells=st.integers(1, 100), gather=st.booleans())
def test_rows_of_a_pool_are_cut_as_bytes_are(num_tokens: int, num_layers: int, max_cells: int, gather: bool) -> None:
    rng = np.random.default_rng(0)
    pool = tuple(rng.integers(1, 256, (num_layers, 40, 9), dtype=np.uint8))
    rows = KvRows(pool, rng.permutation(40)[:num_tokens])
    whole = memoryview(np.stack([layer[rows.at] for layer in pool]))  # type: ignore[arg-type]
    tokens, layers = (7, 7 + num_tokens), (2, 2 + num_layers)
    of_rows, of_bytes = (
        list(cut(b"id", 5, tokens, layers, payload, 9 * max_cells, gather=gather)) for payload in (rows, whole)
    )
    for piece, expected in zip(of_rows, of_bytes, strict=True):
        part = piece.payload
        assert isinstance(part, KvRows) and replace(expected, payload=part) == piece
        assert piece.num_bytes == expected.num_bytes <= 9 * max_cells
        assert b"".join(layer[part.at].tobytes() for layer in part.layers) == bytes(expected.payload)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "layers", "num_bytes", "max_frame_bytes"),
    [
        ((0, 3), (0, 1), 10, 100),
        ((0, 0), (0, 1), 10, 100),
        ((0, 1), (1, 1), 10, 100),
        ((0, 2), (0, 2), 0, 100),
        ((0, 2), (0, 1), 40, 19),
    ],
)
def test_what_cannot_be_cut_is_refused(
    tokens: tuple[int, int], layers: tuple[int, int], num_bytes: int, max_frame_bytes: int
) -> None:
    with pytest.raises(InternalError):
        list(cut(b"id", 0, tokens, layers, memoryview(bytes(num_bytes)), max_frame_bytes))
