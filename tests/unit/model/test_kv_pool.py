from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from shoal.model.kv_layout import KvLayout, stage_layout
from shoal.model.kv_pool import KvPool, on_host


def make_layout(block_tokens: int = 4, *, is_apart: bool = False) -> KvLayout:
    return stage_layout(
        num_layers=3, num_kept=2, num_held=3, num_kv_heads=2, head_dim=2, dtype_bytes=4, block_tokens=block_tokens,
        is_apart=is_apart,
    )  # fmt: skip


def make_pool(num_blocks: int = 4, block_tokens: int = 4) -> KvPool:
    layout = make_layout(block_tokens)
    return KvPool(layout, num_blocks, dtype=torch.float32, device=torch.device("cpu"))


def test_slots_follow_the_block_table_not_the_position():
    layout = make_pool().layout
    assert layout.slots([3, 0, 2], 2, 9).tolist() == [14, 15, 0, 1, 2, 3, 8]
    assert layout.slots([3, 0, 2], 4, 4).tolist() == []


def test_what_is_written_through_layers_is_read_back_and_nothing_else_changes():
    pool = make_pool()
    slots = torch.tensor([5, 6, 12])
    kv = torch.randn(2, 3, 2, 2, 2)
    pool.write_layers(1, slots, kv)
    assert torch.equal(pool.read_layers(1, 3, slots), kv)
    assert pool.layers[0].abs().sum() == 0
    others = [slot for slot in range(16) if slot not in slots.tolist()]
    assert pool.layers[1][others].abs().sum() == 0


def test_a_copied_block_is_equal_in_every_layer():
    pool = make_pool()
    for layer in pool.layers:
        layer.normal_()
    pool.copy_blocks([(1, 3)])
    for layer in pool.layers:
        assert torch.equal(layer[4:8], layer[12:16])


def test_layers_are_read_as_they_lie_in_any_dtype_and_of_no_slots_nothing_is():
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        pool = KvPool(make_pool().layout, 4, dtype=dtype, device=torch.device("cpu"))
        for layer in pool.layers:
            layer.copy_(torch.randn(layer.shape))
        for slots in ([9, 2, 3], [5, 6, 7, 8], [15], [3, 4, 6], [7, 6], []):
            read = pool.read_layers(1, 3, torch.tensor(slots, dtype=torch.int64))
            rows = pool.rows(1, 3, torch.tensor(slots, dtype=torch.int64))
            assert rows is not None and rows.at.tolist() == slots and len(rows) == read.nbytes
            for held, layer in zip(rows.layers, pool.layers[1:], strict=True):
                assert np.shares_memory(held, layer.view(torch.uint8).numpy())
            assert b"".join(held[rows.at].tobytes() for held in rows.layers) == read.view(torch.uint8).numpy().tobytes()
            assert read.shape == (2, len(slots), 2, 2, 2) and read.dtype == dtype
            for layer, found in zip(pool.layers[1:], read, strict=True):
                assert torch.equal(layer.view(torch.uint8)[slots], found.view(torch.uint8))


def test_rows_of_what_is_not_the_hosts_memory_there_are_none_of():
    pool = KvPool(make_pool().layout, 4, dtype=torch.float32, device=torch.device("meta"))
    assert pool.rows(0, 2, torch.tensor([1])) is None


@pytest.mark.parametrize("slot", [-1, 16])
def test_a_slot_that_is_not_there_is_neither_read_nor_written(slot: int):
    layout = replace(make_pool().layout, state_dim=2)
    pool = KvPool(layout, 4, dtype=torch.bfloat16, device=torch.device("cpu"))
    slots, kv, states = torch.tensor([3, slot]), torch.ones(1, 2, 2, 2, 2), torch.ones(2, 2)
    for use in (
        lambda: pool.read_layers(0, 2, slots),
        lambda: pool.rows(0, 2, slots),
        lambda: pool.read_states(slots),
        lambda: pool.write(0, slots, kv[0]),
        lambda: pool.write_layers(0, slots, kv),
        lambda: pool.write_states(slots, states),
    ):
        with pytest.raises(IndexError):
            use()
    assert not any(held.any() for held in (*pool.layers, pool.states))


@pytest.mark.parametrize("shape", [(1, 2, 2, 2), (3, 2, 2, 1), (3, 2, 2, 3), (3, 8), (4, 2, 2, 2)])
def test_rows_that_do_not_fit_are_not_written(shape: tuple[int, ...]):
    pool, slots = make_pool(), torch.tensor([5, 6, 12])
    with pytest.raises(ValueError, match="doesn't fit into 3 slots"):
        pool.write(0, slots, torch.ones(shape))
    assert pool.layers[0].abs().sum() == 0


def test_a_pool_that_no_memory_holds_says_so():
    with pytest.raises(MemoryError, match="no memory for 140,737,488,355,328 bytes"):
        make_pool(num_blocks=1 << 40)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_what_is_on_a_gpu_comes_into_pinned_memory() -> None:
    rows = torch.randn(300, 4, device="cuda").mT  # as it lies, it doesn't matter
    copy = on_host(rows)
    assert copy.is_pinned() and copy.is_contiguous() and torch.equal(copy, rows.cpu())
