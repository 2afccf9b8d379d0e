"""What a client gets."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.wire.messages import Depth, FinishReason, TokenLogprob


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request took. ``depth`` says how deep the prompt was encoded; ``None`` if the server doesn't."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    depth: Depth | None


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer. ``stop`` is the string of the request's ``stop`` that ended it, if one did."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop: str | None
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """All answers to a prompt: ``choices`` has one for each of the request's ``n``, by index.

    ``prompt_logprobs``, if asked for, has each prompt token but the first, which nothing comes before.
    """

    choices: tuple[Choice, ...]
    usage: Usage
    model: str
    request_id: str
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def text(self) -> str:
        """The first answer's."""
        return self.choices[0].text


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step brought for the answer ``index``. ``text`` may be empty: half of a character isn't shown yet.

    ``finish_reason`` is set in an answer's last one.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop: str | None
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is served. ``created_s`` is when it began to be, in Unix time."""

    name: str
    max_context_tokens: int
    created_s: int
