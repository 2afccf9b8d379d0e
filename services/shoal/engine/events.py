"""What a step of an engine brings: frozen values, from the engine's thread to the event loop."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.engine.logprobs import ScoredToken
from shoal.engine.runner import PrefillChunk
from shoal.errors import ShoalError
from shoal.wire.messages import FinishReason


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One choice's next token. ``index`` counts from 0; ``is_first``: this engine has said none of it before;
    ``first_step_s`` is when its request's first step began; ``num_present`` tokens of its prompt were not computed for
    it."""

    request_id: str
    choice: int
    index: int
    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    finish_reason: FinishReason | None
    stop_reason: int | None
    first_step_s: float
    num_present: int = 0
    is_first: bool = False


@dataclass(frozen=True, slots=True)
class PromptEvent:
    """Log-probabilities of a request's next prompt tokens, from its second token on; each comes once.

    With a ``finish_reason``, the prompt was all there was to compute.
    """

    request_id: str
    scores: tuple[ScoredToken, ...]
    finish_reason: FinishReason | None
    first_step_s: float
    num_present: int = 0


@dataclass(frozen=True, slots=True)
class Reservation:
    """The request holds ``blocks`` for its whole prompt, whose first ``num_present`` tokens' K/V are there already."""

    request_id: str
    blocks: tuple[int, ...]
    num_present: int = 0


@dataclass(frozen=True, slots=True)
class FailureEvent:
    """A choice that ended with an error of ours; everything it held is given back. ``prompt`` is the hash of its prompt
    if its own rows were NaN or infinite, ``None`` if the step failed."""

    request_id: str
    choice: int
    error: ShoalError
    prompt: int | None = None


@dataclass(frozen=True, slots=True)
class EngineCounts:
    """What is held right now, and what has happened so far. Deep blocks are of layers that have their own."""

    num_waiting: int
    num_reserved: int
    num_running: int
    num_blocks: int
    num_free_blocks: int
    num_reserved_blocks: int
    num_preemptions: int
    num_deep_blocks: int = 0
    num_free_deep_blocks: int = 0


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step brought. Times are monotonic seconds of this process.

    ``finished_kv_bytes``: what each choice held that has ended since the last step.
    ``all_failed``: it ran something, and no request came any further.
    ``wants_blocks``: a running sequence waits for blocks that reserved ones hold, and the youngest should be given up.
    """

    started_s: float
    ended_s: float
    counts: EngineCounts
    num_rows: int = 0
    num_sequences: int = 0
    reserved: tuple[Reservation, ...] = ()
    prompts: tuple[PromptEvent, ...] = ()
    tokens: tuple[TokenEvent, ...] = ()
    chunks: tuple[PrefillChunk, ...] = ()
    failures: tuple[FailureEvent, ...] = ()
    all_failed: bool = False
    wants_blocks: bool = False
    finished_kv_bytes: tuple[int, ...] = ()

    @property
    def is_idle(self) -> bool:
        """Nothing could run, or nobody waits for what did: there is nothing to do until the next command, which in the
        second case is on its way."""
        return not (self.num_rows or self.reserved or self.chunks or self.failures)

    @property
    def can_wait(self) -> bool:
        """Nothing but tokens in the midst of answers: neither a first one, which is waited for, nor a last one."""
        if not self.tokens or self.reserved or self.prompts or self.chunks or self.failures:
            return False
        return not any(one.is_first or one.finish_reason is not None for one in self.tokens)
