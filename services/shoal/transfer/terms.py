"""What a lease is for, and whose it is."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.errors import InternalError
from shoal.messages import Chunk


@dataclass(frozen=True, slots=True)
class KvShape:
    """What the K/V of a plan's prompts look like. ``token_layer_bytes`` is K and V of one token in one layer."""

    plan_hash: str
    num_layers: int
    num_shallow_layers: int
    token_layer_bytes: int

    def part_bytes(self, chunk: Chunk) -> tuple[int, int]:
        """Bytes of ``chunk`` in the layers that prefill ran (shallow), and in those it projected (deep)."""
        layer_bytes = (chunk.token_end - chunk.token_start) * self.token_layer_bytes
        num_shallow = max(0, min(chunk.layer_end, self.num_shallow_layers) - chunk.layer_start)
        return num_shallow * layer_bytes, (chunk.layer_end - chunk.layer_start - num_shallow) * layer_bytes


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """What a lease is for: the prompt (``N >= 1`` ids), how many tokens at its front decode has, the byte credit."""

    token_ids: tuple[int, ...]
    num_present: int
    shape: KvShape
    credit_bytes: int

    def __post_init__(self) -> None:
        if not 0 <= self.num_present < len(self.token_ids):
            raise InternalError(f"{self.num_present} of {len(self.token_ids)} tokens present: the last one must not be")


@dataclass(frozen=True, slots=True)
class Owner:
    """Which session claimed a lease, and which process start is behind it."""

    session_id: int
    incarnation: int
