"""What all replicas of one simulation have in common."""

from __future__ import annotations

from dataclasses import dataclass

from simulation.agenda import Agenda
from simulation.costs import PrefillCost, StepCosts

from shoal.config import PREFILL_NICENESS, ShoalConfig, StageConfig
from shoal.decode.yielding import yield_s_of
from shoal.engine.scheduler import Scheduler
from shoal.errors import ConfigError
from shoal.model.kv_layout import KvLayout, LayerGroup


@dataclass(frozen=True, slots=True)
class Setting:
    """``config`` is as ``shoal serve`` takes it: limits of steps, sequences, queues, pools, and the hand-off's."""

    agenda: Agenda
    costs: StepCosts
    config: ShoalConfig
    skip_layers: int

    @property
    def prefill_cost(self) -> PrefillCost:
        return self.costs.of_skip(self.skip_layers)

    @property
    def threads(self) -> int:
        """Of a step, where cores are shared."""
        return 1 if self.costs.sharing is None else self.costs.sharing.threads

    @property
    def prefill_niceness(self) -> int:
        """Of its threads, which counts where they share cores with others."""
        configured = self.config.prefill.niceness
        return PREFILL_NICENESS if configured is None else configured

    @property
    def decode_niceness(self) -> int:
        return self.config.decode.niceness or 0

    def yield_s(self, num_decode: int, *, is_shared: bool) -> float:
        """How long each of so many decode replicas leaves the cores to prefill, if all of them share a machine's, and
        those are too few for the threads of both pools."""
        if self.config.handoff.yield_s is not None:
            return self.config.handoff.yield_s
        return yield_s_of(num_decode) if is_shared and self.are_cores_short else 0.0

    def packs_up_to(self, pool: StageConfig, *, is_shared: bool) -> int:
        """Calls that a replica of ``pool`` gets before another one gets any; 0: they are spread."""
        sharing = self.costs.sharing
        return pool.packs_up_to(share_cores=is_shared and sharing is not None and sharing.threads >= sharing.cores)

    @property
    def are_cores_short(self) -> bool:
        """Whether a machine that all replicas share has fewer cores than both pools have threads."""
        sharing = self.costs.sharing
        return sharing is not None and 2 * sharing.threads > sharing.cores

    def prefill_scheduler(self) -> Scheduler:
        """As each prefill replica has one, whose pool has the kept layers alone. Raises ConfigError."""
        kept = self.costs.num_layers - self.skip_layers
        token_bytes = max(1, self.costs.handoff.token_bytes * kept // self.costs.num_layers)
        return _scheduler(self.config.prefill, self.costs.prefill_pool_tokens, token_bytes, 1.0)

    def decode_scheduler(self) -> Scheduler:
        """As each decode replica has one. Raises ConfigError."""
        token_bytes, ratio = self.costs.handoff.token_bytes, self.config.handoff.max_reserved_ratio
        return _scheduler(self.config.decode, self.costs.decode_pool_tokens, token_bytes, ratio)


def _scheduler(limits: StageConfig, pool_tokens: int, token_bytes: int, max_reserved_ratio: float) -> Scheduler:
    if limits.kv_pool_bytes is not None:
        pool_tokens = limits.kv_pool_bytes // token_bytes
    num_blocks = limits.num_blocks or pool_tokens // limits.block_tokens
    if num_blocks < 1:
        raise ConfigError("a pool holds no block: give it more memory, or smaller blocks")
    # A block is a number of tokens here, whatever is in it.
    layout = KvLayout((LayerGroup("all", 0, 1),), 1, 1, 1, limits.block_tokens)
    return Scheduler(
        layout,
        num_blocks,
        max_step_tokens=limits.max_step_tokens,
        max_sequences=limits.max_sequences,
        max_queued=limits.max_queued,
        max_queued_tokens=limits.max_queued_tokens,
        max_reserved_ratio=max_reserved_ratio,
        target_step_s=limits.target_step_s,
    )
