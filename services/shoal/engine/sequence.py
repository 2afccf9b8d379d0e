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
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from shoal.engine.prefix import Piece
from shoal.wire.handoff_messages import WireMode
from shoal.wire.messages import SamplingParams


class Phase(enum.Enum):
    WAITING = enum.auto()
    RESERVED = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(eq=False)
class Sequence:
    """``num_prompt_tokens`` (N) and which positions are ``shallow`` are fixed at admission and never inferred again.

    ``num_to_compute`` is N for a sequence that is sampled and N - 1 at prefill, where the boundary token isn't run.
    ``forks`` are a prompt's choices if it has several, and what each has said already, until they part: after its
    boundary step. ``num_present`` tokens' K/V were there before, in blocks that others share. ``arrived`` are positions
    whose K/V came from prefill, so that computing skips them. Deep layers that hold no shallow tokens have their own
    ``deep_blocks``. ``cut`` are its first whole blocks as the prefix cache knows them, once it was looked for there;
    ``num_seen`` how many the cache had taken in by then.
    ``num_scored`` counts prompt tokens whose log-probability is out: a recompute doesn't tell them again.
    Of a prompt that is shipped in ``wire_mode``, tokens before ``num_shipped`` need not be (any more); ``num_unsent``
    counts chunks that prefill computed and has not yet sent: the scheduler waits for the wire.
    ``due_s`` says who comes first (the engine's clock), ``hurries_from_s`` from when on it has too little time left to
    wait for others' prompts, and ``came_back`` that it gave its blocks up once, and
    ``stood_back`` that it had only reserved them;
    ``is_resumed`` that some of its answer was sent by another engine, ``has_spoken`` that this one has said some.
    ``first_step_s`` is when its first step began (monotonic seconds of this process).
    """

    request_id: str
    prompt: tuple[int, ...]
    shallow: range
    sampling: SamplingParams
    choice: int = 0
    hold: bool = False
    sampled: bool = True
    phase: Phase = Phase.WAITING
    output: list[int] = field(default_factory=list)
    forks: dict[int, list[int]] = field(default_factory=dict)
    blocks: list[int] = field(default_factory=list)
    deep_blocks: list[int] = field(default_factory=list)
    arrived: range = range(0)
    tenant: str = ""
    cut: tuple[Piece, ...] = ()
    num_seen: int = -1
    num_present: int = 0
    num_computed: int = 0
    num_scored: int = 0
    wire_mode: WireMode = WireMode.KV
    num_shipped: int = 0
    num_unsent: int = 0
    due_s: float = math.inf
    hurries_from_s: float = math.inf
    came_back: bool = False
    stood_back: bool = False
    is_resumed: bool = False
    has_spoken: bool = False
    first_step_s: float | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def num_to_compute(self) -> int:
        """Tokens whose K/V must exist before the next one can be sampled (or the prompt is ready to ship)."""
        return len(self.prompt) + len(self.output) if self.sampled else len(self.prompt) - 1

    @property
    def last_token_id(self) -> int:
        return self.output[-1] if self.output else self.prompt[-1]

    @property
    def must_go_on(self) -> bool:
        """No token may end it yet, however likely."""
        return len(self.output) < self.sampling.min_tokens

    @property
    def wants_likeliest(self) -> bool:
        """Of its next logits only which one is the largest."""
        return not self.sampling.temperature and self.sampling.num_logprobs is None and not self.must_go_on

    @property
    def num_places(self) -> int:
        """How many sequences this is, or will be once its choices fork."""
        return max(1, len(self.forks))

    @property
    def num_pending(self) -> int:
        """Tokens that are known and not yet computed, nor arrived."""
        num_ahead = len(self.arrived) if self.num_computed <= self.arrived.start else 0
        return self.num_to_compute - self.num_computed - num_ahead

    @property
    def may_reuse(self) -> bool:
        """Not where prompt tokens are to be scored, for they must be run; nor at prefill before their ids are here."""
        return (self.sampled or self.phase is not Phase.WAITING) and self.sampling.num_prompt_logprobs is None

    @property
    def is_untouched(self) -> bool:
        """Nothing of it was computed, nor has it arrived: what it has was found."""
        return self.num_computed == self.num_present and not self.arrived

    @property
    def recalled(self) -> range:
        """Positions that are to be shipped and need not be computed: they were found."""
        return range(0) if self.sampled else range(self.num_shipped, max(self.num_shipped, self.num_computed))

    def ready_to_send(self, end: int) -> None:
        """A chunk is there that ends with the token before position ``end``."""
        self.num_shipped = max(self.num_shipped, end)
        self.num_unsent += 1

    def take_present(self, num_tokens: int) -> None:
        self.num_present = self.num_computed = num_tokens

    def arrive(self, num_tokens: int) -> None:
        """The K/V of the first ``num_tokens`` are there, as prefill has them: full-depth ones are to be computed still,
        but where nothing is shallow prefill's layers are all that there are."""
        whole = self.shallow or range(num_tokens)
        start, end = max(whole.start, self.num_present), min(whole.stop, num_tokens)
        self.arrived = range(start, end) if start < end else range(0)
        self.advance(self.num_present)

    def advance(self, end: int) -> None:
        """Positions before ``end`` are computed; those that arrived right behind them are passed over."""
        self.num_computed = self.arrived.stop if self.arrived and end == self.arrived.start else end

    def pieces(self, num_tokens: int) -> Iterator[tuple[int, int]]:
        """What is to be computed next, at most ``num_tokens``: positions ``[start, end)``, two where some arrived."""
        start = self.num_computed
        if start < self.arrived.start:
            end = min(start + num_tokens, self.arrived.start)
            yield start, end
            num_tokens, start = num_tokens - (end - start), self.arrived.stop
            if end < self.arrived.start:
                return
        end = min(start + num_tokens, self.num_to_compute)
        if start < end:
            yield start, end

    def num_full_before(self, position: int) -> int:
        """How many of the tokens before ``position`` are full depth."""
        return position - min(max(position - self.shallow.start, 0), len(self.shallow))

    def token_ids(self, start: int, end: int) -> list[int]:
        """Ids of positions ``[start, end)`` of prompt and output together."""
        split = len(self.prompt)
        if end <= split:
            return list(self.prompt[start:end])
        return list(self.prompt[start:]) + self.output[max(0, start - split) : end - split]
