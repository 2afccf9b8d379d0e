"""The blocks that sequences hold, one table for all layers or, where deep layers hold fewer tokens, two.

A pool's slots are found by a sequence's blocks and an index: in most layers that is the token's position; in deep
layers that hold no shallow tokens, it is how many tokens before it they do hold.
"""

from __future__ import annotations

import enum

from shoal.engine.blocks import BlockAllocator
from shoal.engine.prefix import Piece, pieces_of
from shoal.engine.sequence import Sequence
from shoal.errors import OutOfBlocks
from shoal.model.kv_layout import KvLayout


class Reuse(enum.StrEnum):
    """Whose K/V a prompt's beginning may come from: nobody's; equal tokens' that were computed alike; or full-depth
    ones', too, where shallow ones would do (the answers of earlier turns)."""

    NONE = "none"
    EXACT = "exact"
    ANY = "any"


class BlockTable:
    """Of the layers that hold every token. ``copies`` are block pairs that the next step must copy first."""

    def __init__(self, num_blocks: int, block_tokens: int, block_bytes: int, *, reuse: Reuse = Reuse.NONE) -> None:
        any_source = None if reuse is Reuse.NONE else reuse is Reuse.ANY
        self.allocator = BlockAllocator(num_blocks, any_source=any_source)
        self.block_bytes = block_bytes
        self._block_tokens = block_tokens
        self.copies: list[tuple[int, int]] = []
        # For whom, when how many blocks were free, and what it would have shared.
        self._looked_up: tuple[tuple[str, int], int] = (("", 0), 0)

    def held(self, sequence: Sequence) -> list[int]:
        """The sequence's own list, to be changed here alone."""
        return sequence.blocks

    def num_held_tokens(self, sequence: Sequence, position: int) -> int:
        """How many of the tokens before ``position`` these layers hold: the index of the one at ``position``."""
        return position

    @property
    def num_slots(self) -> int:
        return self.allocator.num_blocks * self._block_tokens

    def num_blocks_for(self, sequence: Sequence, position: int) -> int:
        return -(-self.num_held_tokens(sequence, position) // self._block_tokens)

    def fits(self, sequence: Sequence, position: int, num_blocks: int) -> bool:
        """Whether a sequence that has no blocks takes at most ``num_blocks`` for its tokens before ``position``, beside
        those that others hold already and it would share."""
        num_wanted = self.num_blocks_for(sequence, position)
        if num_wanted <= num_blocks:
            return True
        # Asked of the head of the queue in every step. A no may be old, until blocks are taken or given back, to which
        # anybody's next few tokens see; a yes may not.
        asked = (sequence.request_id, self.allocator.num_free)
        if self._looked_up[0] == asked and num_wanted - self._looked_up[1] > num_blocks:
            return False
        num_shared = sum(self.allocator.count(block) > 0 for block in self._known(sequence))
        self._looked_up = (asked, num_shared)
        return num_wanted - num_shared <= num_blocks

    def allocate(self, sequence: Sequence, position: int) -> None:
        """Blocks for a sequence that has none, for its tokens before ``position``: remembered ones first, whose tokens
        are then ``present``. Raises OutOfBlocks."""
        known = self._known(sequence)
        self.allocator.share(known)
        try:
            fresh = self.allocator.allocate(self.num_blocks_for(sequence, position) - len(known))
        except OutOfBlocks:
            self.allocator.release(known)
            raise
        self.held(sequence)[:] = known + fresh
        sequence.take_present(len(known) * self._block_tokens)

    def find(self, sequence: Sequence) -> None:
        """For an untouched sequence: put blocks that are remembered by now in the place of its own, which nothing was
        written to. Those that it has found before stay: they may be on their way to decode."""
        prefixes = self.allocator.prefixes
        if prefixes is None or sequence.num_seen == prefixes.num_inserted:
            return
        sequence.num_seen = prefixes.num_inserted
        known, blocks = self._known(sequence), self.held(sequence)
        num_found = sequence.num_present // self._block_tokens
        if known[:num_found] != blocks[:num_found]:
            return  # what it has found is known no more: what follows the same tokens now may follow other K/V
        self.allocator.share(known[num_found:])
        self.allocator.release(blocks[num_found : len(known)])
        blocks[num_found : len(known)] = known[num_found:]
        sequence.take_present(len(known) * self._block_tokens)

    def _known(self, sequence: Sequence) -> list[int]:
        """Blocks that hold a sequence's first tokens already; never its last one, which is to be run."""
        prefixes = self.allocator.prefixes
        if prefixes is None or not sequence.may_reuse:
            return []
        num_whole = (sequence.num_to_compute - 1) // self._block_tokens
        return prefixes.match(sequence.tenant, self._pieces(sequence, num_whole))

    def remember(self, sequence: Sequence) -> None:
        """Let others find what a sequence has computed, as far as it fills blocks."""
        if self.allocator.prefixes is not None and sequence.may_reuse:
            num_whole = sequence.num_computed // self._block_tokens
            self.allocator.remember(sequence.tenant, self._pieces(sequence, num_whole), self.held(sequence)[:num_whole])

    def _pieces(self, sequence: Sequence, num_blocks: int) -> tuple[Piece, ...]:
        """Cut once: it takes as long as some layers, and who waits is looked up again and again."""
        if num_blocks > len(sequence.cut):
            num_whole = sequence.num_to_compute // self._block_tokens
            token_ids = sequence.token_ids(0, num_whole * self._block_tokens)
            sequence.cut = tuple(pieces_of(token_ids, sequence.shallow, self._block_tokens, num_whole))
        return sequence.cut[:num_blocks]

    def own(self, sequence: Sequence, start: int, end: int) -> None:
        """Make positions ``[start, end)`` writable: missing blocks, and copies of shared ones.

        Raises OutOfBlocks and takes nothing.
        """
        blocks = self.held(sequence)
        missing = self.num_blocks_for(sequence, end) - len(blocks)
        first_written = self.num_held_tokens(sequence, start) // self._block_tokens
        shared = [index for index in range(first_written, len(blocks)) if self.allocator.count(blocks[index]) > 1]
        if missing <= 0 and not shared:
            return
        fresh = self.allocator.allocate(max(0, missing) + len(shared))
        for index in shared:
            source, target = blocks[index], fresh.pop()
            self.allocator.release([source])
            blocks[index] = target
            self.copies.append((source, target))
        blocks.extend(fresh)

    def share(self, root: Sequence, twin: Sequence) -> None:
        """Let ``twin`` hold what ``root`` holds."""
        self.allocator.share(self.held(root))
        self.held(twin)[:] = self.held(root)

    def give_up(self, sequence: Sequence) -> None:
        """Give back every block, and forget copies into them."""
        blocks = self.held(sequence)
        self.allocator.release(blocks)
        mine = set(blocks)
        self.copies = [pair for pair in self.copies if pair[1] not in mine]
        blocks.clear()

    def take_copies(self) -> tuple[tuple[int, int], ...]:
        copies, self.copies = tuple(self.copies), []
        return copies


class DeepTable(BlockTable):
    """Of deep layers that hold no shallow tokens."""

    def held(self, sequence: Sequence) -> list[int]:
        return sequence.deep_blocks

    def num_held_tokens(self, sequence: Sequence, position: int) -> int:
        return sequence.num_full_before(position)


def block_tables(
    layout: KvLayout, num_blocks: int, num_deep_blocks: int, reuse: Reuse = Reuse.NONE
) -> tuple[BlockTable, ...]:
    """Where deep layers hold other tokens than the rest, nothing is reused: one table's hit would be half a hit."""
    if layout.apart is not None:
        reuse = Reuse.NONE
    tables = [BlockTable(num_blocks, layout.block_tokens, layout.block_bytes, reuse=reuse)]
    if layout.apart is not None:
        tables.append(DeepTable(num_deep_blocks, layout.block_tokens, layout.deep_block_bytes))
    return tuple(tables)
