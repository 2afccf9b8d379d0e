"""Which blocks hold the K/V of tokens that may come again, found by what the tokens are and how they were computed.

A tree a tenant: a node is a full block, below the one that comes before it. K/V of deep layers depend on how every
token before was computed (arXiv 2602.03295: a shallow token's are *projected*, a full-depth one's its *own*), so a
node is known by its tokens and by which of them are own. Plain Python, no torch; the engine thread owns it.

::

    tenant ─ [the sea is   ] ─ [blue, and the] ─ …
             projected          projected    ╲
                                              [blue, and it]   the answer of a turn before: own
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A block's tokens. Bit i of ``own`` says that token i was computed at full depth."""

    tokens: Tokens
    own: int

    def serves(self, wanted: Piece, *, any_source: bool) -> bool:
        """Whether this block may stand for ``wanted``; with ``any_source``, own K/V may for projected ones, too."""
        return self.own == wanted.own or (any_source and self.own & wanted.own == wanted.own)


@dataclass(eq=False, slots=True)
class _Node:
    block: int
    piece: Piece
    parent: _Node | None
    siblings: dict[Tokens, list[_Node]]
    children: dict[Tokens, list[_Node]] = field(default_factory=dict)


class PrefixCache:
    """What blocks hold. Those that no sequence holds are *idle* and may be evicted: ``rest`` and ``take`` tell."""

    def __init__(self, *, any_source: bool = False) -> None:
        self._any_source = any_source
        self._roots: dict[str, dict[Tokens, list[_Node]]] = {}
        self._nodes: dict[int, _Node] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # the longest idle first
        self.num_inserted = 0  # blocks so far: who has looked since the last one finds nothing new

    def __contains__(self, block: int) -> bool:
        return block in self._nodes

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def rest(self, block: int) -> None:
        """Nobody holds ``block`` any more. A sequence's last blocks first: ends then go before beginnings."""
        self._idle[block] = None

    def take(self, block: int) -> None:
        """Somebody holds ``block`` again."""
        del self._idle[block]

    def match(self, tenant: str, pieces: Sequence[Piece]) -> list[int]:
        """The blocks of the longest known beginning of ``pieces``."""
        found: list[int] = []
        below = self._roots.get(tenant, {})
        for piece in pieces:
            node = self._best(below, piece)
            if node is None:
                break
            found.append(node.block)
            below = node.children
        return found

    def insert(self, tenant: str, pieces: Sequence[Piece], blocks: Sequence[int]) -> None:
        """Remember that ``blocks``, which are held, hold ``pieces``. What is known already stays where it is."""
        parent: _Node | None = None
        below = self._roots.setdefault(tenant, {}) if pieces else {}
        for piece, block in zip(pieces, blocks, strict=True):
            node = self._nodes.get(block)  # which may have stood for this piece
            if node is None:
                node = next((node for node in below.get(piece.tokens, ()) if node.piece == piece), None)
            if node is None:
                node = self._nodes[block] = _Node(block, piece, parent, below)
                below.setdefault(piece.tokens, []).append(node)
                self.num_inserted += 1
            elif node.parent is not parent:
                break
            parent, below = node, node.children

    def forget(self, blocks: Sequence[int]) -> list[int]:
        """Never serve ``blocks`` again, nor what came after them; all that went."""
        gone: list[int] = []
        for block in blocks:
            if (node := self._nodes.get(block)) is not None:
                gone += [one.block for one in self._drop(node)]
        return gone

    def evict(self) -> list[int]:
        """Forget the block that was idle the longest, and what comes after it; all that went. Those of them that are
        held are only not known any more. Raises LookupError if none is idle."""
        if not self._idle:
            raise LookupError("no block is idle")
        # Who holds what comes after it has a copy of its own of what comes before.
        return self.forget([next(iter(self._idle))])

    def _best(self, below: dict[Tokens, list[_Node]], piece: Piece) -> _Node | None:
        """An exact one if there is one."""
        fitting = [
            node for node in below.get(piece.tokens, ()) if node.piece.serves(piece, any_source=self._any_source)
        ]
        return min(fitting, key=lambda node: node.piece != piece, default=None)

    def _drop(self, node: _Node) -> Iterator[_Node]:
        same = node.siblings[node.piece.tokens]
        same.remove(node)
        if not same:
            del node.siblings[node.piece.tokens]
        if node.parent is None:
            self._roots = {tenant: tree for tenant, tree in self._roots.items() if tree}
        waiting = [node]
        while waiting:
            one = waiting.pop()
            waiting += (child for children in one.children.values() for child in children)
            del self._nodes[one.block]
            self._idle.pop(one.block, None)
            yield one


def pieces_of(token_ids: Sequence[int], shallow: range, block_tokens: int, num_blocks: int) -> list[Piece]:
    """The first ``num_blocks`` whole blocks of a sequence whose ``shallow`` positions are projected."""
    whole = (1 << block_tokens) - 1
    found = []
    for start in range(0, num_blocks * block_tokens, block_tokens):
        first, last = max(start, shallow.start) - start, min(start + block_tokens, shallow.stop) - start
        projected = (1 << last) - (1 << first) if first < last else 0
        found.append(Piece(tuple(token_ids[start : start + block_tokens]), whole & ~projected))
    return found
