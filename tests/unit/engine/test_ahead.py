"""Memory is there before it's wanted, no more of it than that, and what it holds stays."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest
import torch

from shoal.engine import ahead as ahead_module
from shoal.engine.ahead import Ahead
from shoal.engine.blocks import BlockAllocator
from shoal.model.kv_layout import stage_layout
from shoal.model.kv_pool import KvPool


def is_given_ahead() -> bool:
    madvise, page = ahead_module._madvise(), mmap.mmap(-1, mmap.PAGESIZE)
    address = np.frombuffer(page, np.uint8).ctypes.data
    return madvise is not None and madvise(address, mmap.PAGESIZE, ahead_module._POPULATE_WRITE) == 0


pytestmark = pytest.mark.skipif(not is_given_ahead(), reason="this system gives no memory ahead of use")

MIB = 1 << 20
NUM_BLOCKS = 256  # of 64 KiB in each layer


def make_pool(num_blocks: int = NUM_BLOCKS, *, state_dim: int = 0) -> KvPool:
    layout = stage_layout(
        num_layers=3, num_kept=2, num_held=3, num_kv_heads=4, head_dim=128, dtype_bytes=4, block_tokens=16,
        state_dim=state_dim,
    )  # fmt: skip
    return KvPool(layout, num_blocks, dtype=torch.float32, device=torch.device("cpu"))


def resident(layer: torch.Tensor) -> int:
    """Bytes of ``layer`` that the system has given."""
    pages = np.zeros(-(-layer.nbytes // mmap.PAGESIZE), np.uint8)
    address, size = ctypes.c_void_p(layer.data_ptr()), ctypes.c_size_t(layer.nbytes)
    assert ctypes.CDLL(None).mincore(address, size, ctypes.c_void_p(pages.ctypes.data)) == 0
    return int(np.count_nonzero(pages & 1)) * mmap.PAGESIZE


def take_all(ahead: Ahead) -> int:
    number = 0
    while not ahead.is_far_enough:
        ahead.take()
        number += 1
        assert number < 1000
    return number


def test_so_much_is_taken_as_is_to_be_ahead_and_of_all_layers_alike():
    pool = make_pool()
    ahead = Ahead(pool, BlockAllocator(NUM_BLOCKS), num_bytes=12 * MIB)
    assert [resident(layer) for layer in pool.layers] == [0, 0, 0]
    assert take_all(ahead) == 6  # pieces of 2 MiB
    assert [resident(layer) for layer in pool.layers] == [4 * MIB] * 3
    assert not any(layer.any() for layer in pool.layers)


def test_what_is_written_stays():
    pool = make_pool()
    for layer in pool.layers:
        layer[5:9] = 7.0
    take_all(Ahead(pool, BlockAllocator(NUM_BLOCKS), num_bytes=1 << 40))
    for layer in pool.layers:
        assert (layer[5:9] == 7).all() and not layer[:5].any() and not layer[9:].any()
