"""Where arriving K/V land, and what is said of bytes that aren't what was sent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from engines import native_kernels

from shoal.backends.cpu.copying import Copier
from shoal.decode.sink import PoolSink
from shoal.handoff.base import crc32c
from shoal.model.kv_layout import stage_layout
from shoal.model.kv_pool import KvPool
from shoal.wire.handoff_messages import Chunk, WireMode

BLOCK = 4
HEAD_DIM = 8  # with K and V of one head in float32 a row is 64 bytes, which the kernel takes


@pytest.fixture(params=["kernel", "numpy"])
def sink(request: pytest.FixtureRequest) -> Iterator[PoolSink]:
    layout = stage_layout(
        num_layers=3, num_kept=2, num_held=3, num_kv_heads=1, head_dim=HEAD_DIM, dtype_bytes=4, block_tokens=BLOCK
    )
    pool = KvPool(layout, 3, dtype=torch.float32, device=torch.device("cpu"))

    def project(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        assert states.isfinite().all()
        return torch.ones(1, len(positions), 2, 1, HEAD_DIM)

    made = PoolSink(pool, project, Copier(native_kernels() if request.param == "kernel" else None))
    yield made
    made.close()


def kv_chunk() -> tuple[Chunk, torch.Tensor]:
    """Of tokens [2, 7) in layers 1 and 2."""
    kv = torch.randn(2, 5, 2, 1, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    payload = kv.numpy().tobytes()
    return Chunk(b"", 0, 2, 7, 1, 3, crc32c(payload), payload), kv


def landed(sink: PoolSink, layer: int) -> torch.Tensor:
    """Tokens [2, 7) of blocks 2 and 0."""
    held = sink._pool.layers[layer]
    return torch.cat([held[2 * BLOCK + 2 : 3 * BLOCK], held[:3]])


async def test_kv_land_in_their_blocks_and_nowhere_else(sink: PoolSink) -> None:
    chunk, kv = kv_chunk()
    assert await sink.write([2, 0], chunk, lambda: True) == chunk.crc32c
    for layer in (0, 1):
        torch.testing.assert_close(landed(sink, 1 + layer), kv[layer], rtol=0, atol=0)
        assert sink._pool.layers[1 + layer].count_nonzero() == kv[layer].count_nonzero()
    assert not sink._pool.layers[0].any()


async def test_other_bytes_have_another_checksum(sink: PoolSink) -> None:
    chunk, _ = kv_chunk()
    spoilt = bytes([chunk.payload[0] ^ 1]) + bytes(chunk.payload[1:])
    assert await sink.write([2, 0], replace(chunk, payload=spoilt), lambda: True) == crc32c(spoilt) != chunk.crc32c


async def test_what_is_not_there_is_not_copied(sink: PoolSink) -> None:
    chunk, _ = kv_chunk()
    assert await sink.write([2, 0], chunk, lambda: False) is None
    assert not any(layer.any() for layer in sink._pool.layers)


async def test_what_went_while_it_was_copied_has_no_checksum(sink: PoolSink) -> None:
    chunk, _ = kv_chunk()
    assert await sink.write([2, 0], chunk, iter([True, False]).__next__) is None
    answers = iter([True, True])
    assert await sink.write([2, 0], chunk, answers.__next__) == chunk.crc32c
    assert next(answers, None) is None  # asked before, and once more behind


async def test_states_that_are_corrupt_are_not_projected(sink: PoolSink) -> None:
    payload = torch.full((5, 4), torch.nan).numpy().tobytes()
    chunk = Chunk(b"", 0, 2, 7, 2, 3, crc32c(payload) ^ 1, payload, wire_mode=WireMode.HIDDEN)
    assert await sink.write([2, 0], chunk, lambda: True) == crc32c(payload)
    assert not any(layer.any() for layer in sink._pool.layers)


async def test_what_no_thread_was_there_for_is_never_copied(sink: PoolSink, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lease has ended by then, and its blocks may be another's."""

    def cannot(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    payload = torch.zeros(2, 4).numpy().tobytes()
    chunk = Chunk(b"", 0, 2, 4, 2, 3, crc32c(payload), payload, wire_mode=WireMode.HIDDEN)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", cannot)
        with pytest.raises(RuntimeError, match="can't start"):
            await sink.write([2, 0], chunk, lambda: True)
    assert await sink.write([1, 0], chunk, lambda: True) == chunk.crc32c
    kv = sink._pool.layers[2]
    assert kv[BLOCK + 2 : 2 * BLOCK].all() and not kv[2 * BLOCK :].any()


async def test_blocks_that_are_not_there_are_an_error(sink: PoolSink) -> None:
    chunk, _ = kv_chunk()
    with pytest.raises(IndexError):
        await sink.write([2, 3], chunk, lambda: True)
    assert not any(layer.any() for layer in sink._pool.layers)
