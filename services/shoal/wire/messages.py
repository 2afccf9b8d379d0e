"""Frozen values that cross a layer: requests and tokens. Those of a hand-off are in handoff_messages.py.

Standard library only: the client, the wire code and the pure decision code all import this module.
Durations are seconds and end in ``_s``; an absent value is ``None``, never ``-1``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

Role = Literal["gateway", "prefill", "decode"]
"""What a process is."""


class Depth(enum.StrEnum):
    """How deep a prompt is encoded. ``AUTO`` is what a client may ask; a plan resolves it."""

    AUTO = "auto"
    SHALLOW = "shallow"
    FULL = "full"


class Stage(enum.StrEnum):
    """The two pools."""

    PREFILL = "prefill"
    DECODE = "decode"


class FinishReason(enum.StrEnum):
    """Why a choice ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What travels with a request through every layer.

    ``timeout_s`` is what is left of the deadline when the message is sent: a duration, because
    clocks of two hosts don't compare.
    """

    request_id: str
    timeout_s: float
    tenant: str = "default"
    attempt: int = 1
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Validated by the gateway; every layer below trusts it.

    ``temperature == 0`` is greedy. ``top_k == 0`` and ``top_p == 1`` mean no restriction.
    ``seed`` is always set: the gateway fixes it, so that a re-run continues identically.
    ``num_logprobs`` is ``None`` for no log-probabilities, else how many alternatives to report.
    ``num_prompt_logprobs`` is the same for the prompt's own tokens: they need a prompt at full depth.
    ``max_tokens == 0``: nothing is sampled, the prompt is all there is to compute.
    ``may_shorten``: nobody asked for ``max_tokens``, so it may be cut to what the KV pool holds.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    num_choices: int = 1
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    may_shorten: bool = False


@dataclass(frozen=True, slots=True)
class PromptOutline:
    """What is known of a prompt's parts: how many tokens its system prompt has, at its front, and how many the header
    of the answer, at its end. Of a text that is no conversation nothing is."""

    num_system_tokens: int = 0
    num_header_tokens: int = 0


@dataclass(frozen=True, slots=True)
class SentChoice:
    """What was given out of a choice: its tokens so far, or all of it. Of a complete one no token is needed."""

    token_ids: tuple[int, ...] = ()
    is_complete: bool = False


@dataclass(frozen=True, slots=True)
class Resumption:
    """Where an answer goes on that a decode replica with that plan has begun: ``choices`` are all of the request's.
    ``plan_hash`` is what its HandoffReport said."""

    plan_hash: str
    choices: tuple[SentChoice, ...]


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One prompt to be continued. ``prompt_token_ids`` has ``N >= 1`` ids; the last is a boundary token.

    With a ``resumption``, outputs begin with what comes after the tokens that were sent, and some choice is incomplete.
    """

    context: RequestContext
    model: str
    prompt_token_ids: tuple[int, ...]
    depth: Depth
    sampling: SamplingParams
    outline: PromptOutline = PromptOutline()
    resumption: Resumption | None = None

    @property
    def max_kv_tokens(self) -> int:
        """Tokens of the prompt, and of each choice at its longest."""
        return len(self.prompt_token_ids) + self.sampling.num_choices * self.sampling.max_tokens


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (natural log, of the unmodified distribution) of a token, and the best alternatives."""

    token_id: int
    token: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TtftStages:
    """Where the time to the first token went, as decode's clock saw it.

    ``queue_s`` and ``prefill_s`` are durations that prefill measured and Seal brought (of decode itself when
    it prefilled locally, and then prefill may have been waited for in vain for some of ``queue_s``);
    ``transfer_exposed_s`` is what the hand-off took beyond them.
    """

    reserve_s: float
    queue_s: float
    prefill_s: float
    transfer_exposed_s: float
    boundary_step_s: float

    @property
    def total_s(self) -> float:
        return self.reserve_s + self.queue_s + self.prefill_s + self.transfer_exposed_s + self.boundary_step_s


@dataclass(frozen=True, slots=True)
class HandoffReport:
    """What one prompt's hand-off did, for usage, the demo and the tests.

    ``depth`` is the depth that was run, ``transferred`` whether prefill's KV was used, ``fallback`` the reason
    why not when a hand-off failed. ``num_cached_tokens`` of the prompt one of the stages had from requests before.
    ``plan_hash`` is of decode's whole plan, with the tokens that it computes itself: only a replica of the same one can
    go on with the answer.
    """

    depth: Depth
    transferred: bool
    fallback: str | None = None
    num_prefill_layers: int = 0
    shallow_bytes: int = 0
    deep_bytes: int = 0
    hidden_bytes: int = 0
    boundary_bytes: int = 0
    num_cached_tokens: int = 0
    plan_hash: str = ""


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """What one engine step, or some in a row, brought for one choice: decode -> gateway.

    ``text`` is the printable text that became final with it; it can be empty (half of a character, or
    text held back because it may begin a stop string). ``stages``, ``handoff`` and ``prompt_logprobs`` (of every prompt
    token but the first, which nothing comes before) come with a request's first output only.
    """

    choice: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    stages: TtftStages | None = None
    handoff: HandoffReport | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


# --- the hand-off ---------------------------------------------------------------------------------------
