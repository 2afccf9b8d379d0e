"""One choice of one prompt, as the engine keeps it.

::

    WAITING ──admit──> RESERVED ──start──> RUNNING ──> FINISHED
       │                 (hold)               │  ^
       └──────────admit───────────────────────┘  └── preempt, requeue: back to WAITING, blocks given up

``RESERVED`` holds blocks for the whole prompt while someone else decides: decode waits for K/V to arrive, prefill for
its claim to be accepted. Everything that can be computed is a property.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from shoal.messages import SamplingParams


class Phase(enum.Enum):
    WAITING = enum.auto()
    RESERVED = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(eq=False)
class Sequence:
    """``num_prompt_tokens`` (N) and ``num_shallow`` are fixed at admission and never inferred again.

    ``num_to_compute`` is N for a sequence that is sampled and N - 1 at prefill, where the boundary token isn't run.
    ``num_scored`` counts prompt tokens whose log-probability is out: a recompute doesn't tell them again.
    ``num_unsent`` counts chunks that prefill computed and has not yet sent: the scheduler waits for the wire.
    ``first_step_s`` is when its first step began (monotonic seconds of this process).
    """

    request_id: str
    prompt: tuple[int, ...]
    num_shallow: int
    sampling: SamplingParams
    choice: int = 0
    hold: bool = False
    sampled: bool = True
    phase: Phase = Phase.WAITING
    output: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_scored: int = 0
    num_unsent: int = 0
    first_step_s: float | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def num_to_compute(self) -> int:
        """Tokens whose K/V must exist before the next one can be sampled (or the prompt is ready to ship)."""
        return len(self.prompt) + len(self.output) if self.sampled else len(self.prompt) - 1

    @property
    def num_places(self) -> int:
        """How many sequences this is, or will be once its choices fork."""
        return self.sampling.num_choices if not self.choice and not self.output else 1

    @property
    def num_pending(self) -> int:
        """Tokens that are known and not yet computed."""
        return self.num_to_compute - self.num_computed

    def token_ids(self, start: int, end: int) -> list[int]:
        """Ids of positions ``[start, end)`` of prompt and output together."""
        split = len(self.prompt)
        if end <= split:
            return list(self.prompt[start:end])
        return list(self.prompt[start:]) + self.output[max(0, start - split) : end - split]
