"""What one token's K/V looks like in a pool: layers, heads, bytes, and how tokens fall into blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers ``[first, last)`` whose blocks live and are shipped together.

    Where a group ``is_apart``, shallow tokens have no K/V in it: it has blocks of its own, fewer of them.
    """

    name: str
    first: int
    last: int
    is_apart: bool = False

    @property
    def num_layers(self) -> int:
        return self.last - self.first


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Layer groups of one pool. A token in a layer is ``[2, num_kv_heads, head_dim]``: K, then V.

    With a ``state_dim``, a token also has the state ``[state_dim]`` that left the last of these layers: what K/V of
    layers that aren't here can be projected from.
    """

    groups: tuple[LayerGroup, ...]
    num_kv_heads: int
    head_dim: int
    dtype_bytes: int
    block_tokens: int
    state_dim: int = 0

    @property
    def num_layers(self) -> int:
        return sum(group.num_layers for group in self.groups)

    @property
    def token_layer_bytes(self) -> int:
        """Bytes of one token's K and V in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.dtype_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of one token's state."""
        return self.state_dim * self.dtype_bytes

    @property
    def apart(self) -> LayerGroup | None:
        """The group with blocks of its own, if there is one."""
        return next((group for group in self.groups if group.is_apart), None)

    @property
    def token_bytes(self) -> int:
        """Bytes of a token that is in all layers."""
        return self.token_layer_bytes * self.num_layers + self.state_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of a block: of a group that is apart, ``deep_block_bytes``, of all the others together, this."""
        return self.token_bytes * self.block_tokens - self.deep_block_bytes

    @property
    def deep_block_bytes(self) -> int:
        return 0 if self.apart is None else self.apart.num_layers * self.token_layer_bytes * self.block_tokens

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def slot(self, blocks: Sequence[int], position: int) -> int:
        """That of a sequence's token at ``position``."""
        return blocks[position // self.block_tokens] * self.block_tokens + position % self.block_tokens

    def slots(self, blocks: Sequence[int], start: int, end: int) -> npt.NDArray[np.int64]:
        """Slots (rows of the pool, ``[end - start]``) of a sequence's tokens ``[start, end)``, given its blocks."""
        size = self.block_tokens
        first = start // size
        held = np.asarray(blocks[first : self.num_blocks_for(end)], dtype=np.int64)
        run = (held[:, None] * size + np.arange(size)).reshape(-1)
        return run[start - first * size : end - first * size]


def stage_layout(
    *,
    num_layers: int,
    num_kept: int,
    num_held: int,
    num_kv_heads: int,
    head_dim: int,
    dtype_bytes: int,
    block_tokens: int,
    is_apart: bool = False,
    state_dim: int = 0,
) -> KvLayout:
    """The groups of a stage that holds the first ``num_held`` of ``num_layers`` layers.

    ``is_apart``: shallow tokens have no K/V in the skipped layers.
    ``state_dim``: of the states that a stage holds which projects K/V of layers that it doesn't have.
    """
    groups = [LayerGroup("shallow", 0, num_kept)]
    if num_held == num_layers > num_kept:
        groups.append(LayerGroup("deep", num_kept, num_layers, is_apart))
    return KvLayout(tuple(groups), num_kv_heads, head_dim, dtype_bytes, block_tokens, state_dim)
