"""Step costs by arithmetic, for a machine that nobody could measure: FLOPs and bytes over what a data sheet promises.

Each rate is a data sheet's times an efficiency, which is an assumption and kept as one. Compute and memory times are
added, not overlapped. It is a way to think about a machine, and no measurement of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from simulation.costs import DecodeCost, HandoffCost, PrefillCost, ServingCost, StepCosts

from shoal.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Chip:
    """What one replica runs on, as its maker says. ``flops`` are of dense bfloat16 products, a second."""

    name: str
    flops: float
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder with gated MLPs. Sizes in numbers; ``q_size`` and ``kv_size`` are heads times their size."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    q_size: int
    kv_size: int
    vocab_size: int

    @property
    def layer_weights(self) -> int:
        attention = 2 * self.hidden_size * (self.q_size + self.kv_size)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def read_weights(self) -> int:
        """What a decode step reads: all layers, and the embedding as the head."""
        return self.num_layers * self.layer_weights + self.vocab_size * self.hidden_size

    @property
    def held_weights(self) -> int:
        """Embedding and head as two matrices."""
        return self.read_weights + self.vocab_size * self.hidden_size


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Shares of the data sheet's rates, and what isn't in a data sheet, in seconds."""

    product_efficiency: float = 0.5
    attention_efficiency: float = 0.3
    memory_efficiency: float = 0.7
    link_efficiency: float = 0.7
    memory_share: float = 0.9
    """Of the chip's memory, for weights and K/V."""
    launch_s: float = 0.003
    handoff_s: float = 0.01
    request_s: float = 0.01
    step_s: float = 0.0005
    token_s: float = 0.0001


def paper_costs(
    chip: Chip, shape: Shape, skips: Sequence[int], assumed: Assumptions, element_bytes: int = 2
) -> StepCosts:
    """For one replica a chip, with ``element_bytes`` a number. Raises ConfigError if the model doesn't fit."""
    products = chip.flops * assumed.product_efficiency
    reads = chip.memory_bytes_per_s * assumed.memory_efficiency
    token_bytes = 2 * shape.num_layers * shape.kv_size * element_bytes
    room = chip.memory_bytes * assumed.memory_share

    def prefill(skip: int) -> PrefillCost:
        kept = shape.num_layers - skip
        weights = kept * shape.layer_weights + skip * 2 * shape.hidden_size * shape.kv_size
        return PrefillCost(
            skip_layers=skip,
            step_s=assumed.launch_s + weights * element_bytes / reads,
            token_s=2 * weights / products,
            token_context_s=4 * shape.q_size * kept / (chip.flops * assumed.attention_efficiency),
        )

    held_bytes = shape.held_weights * element_bytes
    if room < held_bytes + token_bytes:
        raise ConfigError(f"{shape.name} needs {held_bytes / 1e9:.0f} GB, and {chip.name} has {room / 1e9:.0f} for it")
    # Prefill holds fewer layers' weights and K/V: with decode's numbers it has at least as much room.
    pool_tokens = int((room - held_bytes) / token_bytes)
    return StepCosts(
        format=1,
        machine=chip.name,
        model=shape.name,
        origin="arithmetic",
        num_layers=shape.num_layers,
        prefill=tuple(prefill(skip) for skip in skips),
        decode=DecodeCost(
            step_s=assumed.launch_s + shape.read_weights * element_bytes / reads,
            sequence_s=2 * shape.read_weights / products,
            context_token_s=token_bytes / reads,
        ),
        handoff=HandoffCost(
            latency_s=assumed.handoff_s,
            bytes_per_s=chip.link_bytes_per_s * assumed.link_efficiency,
            token_bytes=token_bytes,
        ),
        serving=ServingCost(request_s=assumed.request_s, step_s=assumed.step_s, token_s=assumed.token_s),
        prefill_pool_tokens=pool_tokens,
        decode_pool_tokens=pool_tokens,
        assumptions={**{name: value for name, value in asdict(chip).items() if name != "name"}, **asdict(assumed)},
    )
