"""What a lease is for, and whose it is."""

from __future__ import annotations

from dataclasses import dataclass, fields

from shoal.errors import InternalError, PlanMismatch
from shoal.wire.handoff_messages import Carrier, Chunk, WireMode


@dataclass(frozen=True, slots=True)
class PartBytes:
    """Bytes of payload: K/V of layers that prefill ran (shallow), K/V that it projected (deep), and states that decode
    projects (hidden)."""

    shallow: int = 0
    deep: int = 0
    hidden: int = 0

    @property
    def total(self) -> int:
        return self.shallow + self.deep + self.hidden

    def __add__(self, other: PartBytes) -> PartBytes:
        return PartBytes(self.shallow + other.shallow, self.deep + other.deep, self.hidden + other.hidden)


PART_NAMES = tuple(field.name for field in fields(PartBytes))


@dataclass(frozen=True, slots=True)
class KvShape:
    """What the K/V of a plan's prompts look like. ``token_layer_bytes`` is K and V of one token in one layer,
    ``state_bytes`` the state of one token that its K/V in skipped layers are projected from."""

    plan_hash: str
    num_layers: int
    num_shallow_layers: int
    token_layer_bytes: int
    state_bytes: int = 0

    def part_bytes(self, chunk: Chunk) -> PartBytes:
        num_tokens = chunk.token_end - chunk.token_start
        if chunk.wire_mode is WireMode.HIDDEN:
            return PartBytes(hidden=num_tokens * self.state_bytes)
        layer_bytes = num_tokens * self.token_layer_bytes
        num_shallow = max(0, min(chunk.layer_end, self.num_shallow_layers) - chunk.layer_start)
        return PartBytes(num_shallow * layer_bytes, (chunk.layer_end - chunk.layer_start - num_shallow) * layer_bytes)

    @property
    def deep_token_bytes(self) -> int:
        """K and V of one token in all skipped layers."""
        return (self.num_layers - self.num_shallow_layers) * self.token_layer_bytes

    @property
    def least_chunk_bytes(self) -> int:
        """A chunk of one token, in one layer or as a state."""
        return min(self.token_layer_bytes, self.state_bytes or self.token_layer_bytes)

    def choose_wire_mode(self, wanted: tuple[WireMode, ...], known: tuple[WireMode, ...], carrier: Carrier) -> WireMode:
        """Of the modes that decode wants and prefill knows. With a choice, K/V within a host; between hosts the states,
        if they are fewer bytes. Raises PlanMismatch if none is left."""
        common = [mode for mode in wanted if mode in known]
        if not common:
            raise PlanMismatch(f"no wire mode in common: {_names(wanted)} here, {_names(known)} at the peer")
        is_fewer = self.state_bytes < self.deep_token_bytes
        preferred = WireMode.HIDDEN if is_fewer and carrier is not Carrier.SHM else WireMode.KV
        return preferred if preferred in common else common[0]


def _names(modes: tuple[WireMode, ...]) -> str:
    return " or ".join(modes) or "none"


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
    """Which session claimed a lease, which process start is behind it, what it ships for the skipped layers, and the
    ``key`` that its process is known by."""

    session_id: int
    incarnation: int
    wire_mode: WireMode = WireMode.KV
    key: bytes = b""
