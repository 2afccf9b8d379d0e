"""Blocks found again by their tokens, by how these were computed, and by whose they are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.blocks import BlockAllocator
from shoal.engine.prefix import Piece, PrefixCache, pieces_of
from shoal.errors import OutOfBlocks

PROJECTED, OWN = 0b00, 0b11


def pieces(*named: str, own: int = PROJECTED) -> list[Piece]:
    """Of two tokens each, by two letters."""
    return [Piece(tuple(map(ord, name)), own) for name in named]


def test_the_longest_known_beginning_is_found():
    cache = PrefixCache()
    cache.insert("a", pieces("th", "e ", "se"), [5, 3, 8])
    assert cache.match("a", pieces("th", "e ", "sk")) == [5, 3]
    assert cache.match("a", pieces("th", "e ", "se", "a.")) == [5, 3, 8]
    assert cache.match("a", pieces("e ", "se")) == []


def test_a_tenant_finds_only_its_own():
    cache = PrefixCache()
    cache.insert("a", pieces("th"), [1])
    assert cache.match("b", pieces("th")) == []


def test_what_was_computed_otherwise_is_not_found():
    cache = PrefixCache()
    cache.insert("a", pieces("th", "e "), [1, 2])
    assert cache.match("a", pieces("th", own=OWN)) == []
    cache.insert("a", pieces("th", own=OWN), [3])
    assert cache.match("a", pieces("th", own=OWN)) == [3]
    assert cache.match("a", pieces("th")) == [1]


def test_own_may_stand_for_projected_where_that_is_allowed_never_the_other_way():
    cache = PrefixCache(any_source=True)
    cache.insert("a", pieces("th", own=OWN), [3])
    assert cache.match("a", pieces("th")) == [3]
    cache.insert("a", pieces("th"), [1])
    assert cache.match("a", pieces("th")) == [1], "an exact one is preferred"
    cache.forget([3])
    assert cache.match("a", pieces("th", own=OWN)) == []
    assert cache.match("a", pieces("th", own=0b01)) == []


def test_equal_content_is_kept_once():
    cache = PrefixCache()
    cache.insert("a", pieces("th", "e "), [1, 2])
    cache.insert("a", pieces("th", "e ", "se"), [7, 8, 9])
    assert cache.match("a", pieces("th", "e ", "se")) == [1, 2, 9]
    assert 7 not in cache and 8 not in cache


def test_the_longest_unused_goes_first_and_ends_before_beginnings():
    allocator = BlockAllocator(5, any_source=False)
    for names in (("th", "e ", "se"), ("a ", "sk")):
        blocks = allocator.allocate(len(names))
        allocator.remember("a", pieces(*names), blocks)
        allocator.release(blocks)
    prefixes = allocator.prefixes
    assert prefixes is not None
    again = prefixes.match("a", pieces("th", "e "))
    allocator.share(again)
    allocator.release(again)
    assert [prefixes.evict() for _ in range(5)] == [[2], [4], [3], [1], [0]]
    with pytest.raises(LookupError):
        prefixes.evict()


def test_forgetting_takes_along_what_came_after():
    cache = PrefixCache()
    cache.insert("a", pieces("th", "e ", "se"), [1, 2, 3])
    cache.insert("a", pieces("th", "is"), [1, 4])
    assert sorted(cache.forget([2, 99])) == [2, 3]
    assert cache.match("a", pieces("th", "e ", "se")) == [1]
    assert sorted(cache.forget([1])) == [1, 4]
    assert len(cache) == 0


def test_pieces_say_which_tokens_are_own():
    found = pieces_of(range(10, 22), range(2, 7), 4, 3)
    assert [piece.own for piece in found] == [0b0011, 0b1000, 0b1111]
    assert [piece.tokens for piece in found] == [(10, 11, 12, 13), (14, 15, 16, 17), (18, 19, 20, 21)]


def test_a_beginning_may_go_whose_end_another_holds():
    """Two that begin alike were computed side by side: each has its own blocks, and one's end hangs on the other's."""
    allocator = BlockAllocator(4, any_source=False)
    prefixes = allocator.prefixes
    assert prefixes is not None
    first, second = allocator.allocate(1), allocator.allocate(2)
    prefixes.insert("a", pieces("th"), first)
    prefixes.insert("a", pieces("th", "e "), second)
    allocator.release(first)
    assert allocator.num_free == 2
    assert sorted(allocator.allocate(2)) == [0, 3]
    assert prefixes.match("a", pieces("th", "e ")) == []
    allocator.release(second)
    assert allocator.num_free == 2 and len(prefixes) == 0


@given(
    st.lists(st.tuples(st.lists(st.sampled_from(["ab", "cd"]), max_size=5), st.booleans(), st.booleans())),
    st.integers(0, 3),
)
def test_every_block_is_somewhere_once(steps: list[tuple[list[str], bool, bool]], num_late: int):
    """Sequences come, find, compute, are remembered (some later than others) or fail, and go: no block is lost, none
    is given twice."""
    allocator = BlockAllocator(7, any_source=True)
    prefixes = allocator.prefixes
    assert prefixes is not None
    open_blocks: list[list[int]] = []
    computing: list[tuple[list[Piece], list[int]]] = []
    for names, own, stays in steps:
        if len(computing) > num_late:
            prefixes.insert("a", *computing.pop(0))
        wanted = pieces(*names, own=OWN if own else PROJECTED)
        known = prefixes.match("a", wanted)
        assert len(set(known)) == len(known)
        allocator.share(known)
        try:
            fresh = allocator.allocate(len(wanted) - len(known))
        except OutOfBlocks:
            allocator.release(known)
            continue
        assert not set(fresh) & {block for blocks in open_blocks for block in blocks}
        assert not any(block in prefixes for block in fresh)
        blocks = known + fresh
        if stays:
            open_blocks.append(blocks)
            computing.append((wanted, blocks))
        else:
            prefixes.insert("a", wanted, blocks)
            if own and blocks:
                allocator.forget(blocks[-1:])
            allocator.release(blocks)
        assert allocator.num_used == len({block for blocks in open_blocks for block in blocks})
    for blocks in open_blocks:
        allocator.release(blocks)
    assert allocator.num_free == 7
    assert sorted(allocator.allocate(7)) == list(range(7))
    assert len(prefixes) == 0
