from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.blocks import BlockAllocator
from shoal.errors import InternalError, OutOfBlocks


def test_taking_more_than_is_free_takes_nothing():
    allocator = BlockAllocator(3)
    allocator.allocate(2)
    with pytest.raises(OutOfBlocks, match="2 blocks wanted, 1 of 3 free"):
        allocator.allocate(2)
    assert allocator.num_free == 1


def test_releasing_or_sharing_a_free_block_is_a_defect():
    allocator = BlockAllocator(2)
    with pytest.raises(InternalError, match="released twice"):
        allocator.release([0])
    with pytest.raises(InternalError, match="can't be shared"):
        allocator.share([0])


@given(st.lists(st.tuples(st.sampled_from(["take", "share", "drop"]), st.integers(0, 7)), max_size=60))
def test_counts_agree_with_a_plain_model(commands: list[tuple[str, int]]):
    allocator = BlockAllocator(6)
    tables: list[list[int]] = []
    for command, number in commands:
        if command == "take" and number <= allocator.num_free:
            tables.append(allocator.allocate(number))
        elif command == "share" and tables:
            table = tables[number % len(tables)]
            allocator.share(table)
            tables.append(list(table))
        elif command == "drop" and tables:
            allocator.release(tables.pop(number % len(tables)))
        held = {block for table in tables for block in table}
        assert allocator.num_used == len(held)
        for block in range(6):
            assert allocator.count(block) == sum(table.count(block) for table in tables)


@given(
    st.lists(
        st.tuples(st.sampled_from(["take", "share", "drop", "reserve", "unreserve"]), st.integers(0, 7)), max_size=60
    )
)
def test_what_reserved_tables_hold_is_counted_as_if_they_were_looked_through(commands: list[tuple[str, int]]):
    allocator = BlockAllocator(6)
    running: list[list[int]] = []
    reserved: list[list[int]] = []
    for command, number in commands:
        tables = [*running, *reserved]
        if command == "take" and number <= allocator.num_free:
            running.append(allocator.allocate(number))
        elif command == "share" and tables:
            table = tables[number % len(tables)]
            allocator.share(table)
            running.append(list(table))
        elif command == "drop" and running:
            allocator.release(running.pop(number % len(running)))
        elif command == "reserve" and running:
            reserved.append(running.pop(number % len(running)))
            allocator.reserve(reserved[-1])
        elif command == "unreserve" and reserved:
            running.append(reserved.pop(number % len(reserved)))
            allocator.unreserve(running[-1])
        holds = Counter(block for table in reserved for block in table)
        assert allocator.num_reserved == len(holds)
        assert allocator.num_only_reserved == sum(num == allocator.count(block) for block, num in holds.items())
