"""What answers look like, for the OpenAPI document alone: answers.py and api.py write them, and tests compare.

``NotNull`` is a field that is either left out or not ``null``.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from shoal.wire.messages import HandoffReport

T = TypeVar("T")

Count = Annotated[int, Field(ge=0)]
NotNull: TypeAlias = T | SkipJsonSchema[None]
FinishReason = Literal["stop", "length"]


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")


# --- parts ----------------------------------------------------------------------------------------------


class PromptTokensDetails(_Shape):
    cached_tokens: Count = Field(description="Tokens of the prompt whose K/V prefill or decode had already.")


class Usage(_Shape):
    """Token counts, and how deep the prompt was encoded."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails
    depth: Literal["shallow", "full"]


class PromptTiming(_Shape):
    """Milliseconds to a prompt's first token, their parts, and what its hand-off did."""

    index: Count
    ttft_ms: float
    stages_ms: dict[str, float]
    handoff: HandoffReport | None


class ChoiceTokens(_Shape):
    """All that was generated, the end token included."""

    index: Count
    token_ids: list[Count]


class Timing(_Shape):
    """What a request that sends ``x-shoal-timing: 1`` cost."""

    prompts: list[PromptTiming]
    choices: list[ChoiceTokens]


class PromptLogprob(_Shape):
    logprob: float
    rank: Annotated[int, Field(ge=1)] | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""Of each token of the prompt, by token id; ``null`` for the first."""


class _Answer(_Shape):
    id: str
    created: Count = Field(description="Unix time.")
    model: str
    shoal: NotNull[Timing] = None


# --- /v1/completions ------------------------------------------------------------------------------------


class CompletionLogprobs(_Shape):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[Count]


class CompletionDelta(_Shape):
    """What a choice begins or goes on with."""

    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None


class CompletionChoice(_Shape):
    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    prompt_logprobs: NotNull[PromptLogprobs] = None
    finish_reason: FinishReason
    stop_reason: str | int | None


class Completion(_Answer):
    object: Literal["text_completion"]
    choices: Annotated[list[CompletionChoice], Field(min_length=1)]
    usage: Usage


class CompletionChunk(_Answer):
    """The data of one event. Only the last may have no choices."""

    object: Literal["text_completion"]
    choices: list[CompletionDelta]
    usage: Usage | None = None


# --- /v1/chat/completions -------------------------------------------------------------------------------


class TokenLogprob(_Shape):
    """``bytes`` is ``null`` for a part of a character."""

    token: str
    logprob: float
    bytes: list[Annotated[int, Field(ge=0, le=255)]] | None


class ChatTokenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(_Shape):
    content: list[ChatTokenLogprob]


class ChatAnswerMessage(_Shape):
    role: Literal["assistant"]
    content: str


class ChatMessageDelta(_Shape):
    role: NotNull[Literal["assistant"]] = None
    content: str


class ChatDelta(_Shape):
    """What a choice begins or goes on with. The first one has the role."""

    index: Count
    delta: ChatMessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None


class ChatChoice(_Shape):
    index: Count
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None


class ChatCompletion(_Answer):
    object: Literal["chat.completion"]
    choices: Annotated[list[ChatChoice], Field(min_length=1)]
    prompt_logprobs: NotNull[PromptLogprobs] = None
    usage: Usage


class ChatCompletionChunk(_Answer):
    """The data of one event. Only the last may have no choices."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatDelta]
    usage: Usage | None = None


# --- others ---------------------------------------------------------------------------------------------


class Model(_Shape):
    id: str
    object: Literal["model"]
    created: Count = Field(description="Unix time.")
    owned_by: Literal["shoal"]
    max_model_len: Count = Field(description="Tokens of a prompt and its answer.")


class Models(_Shape):
    object: Literal["list"]
    data: list[Model]


class Healthy(_Shape):
    status: Literal["ok"]


class Ready(_Shape):
    status: Literal["ready", "degraded: no prefill"]
    num_decode: Annotated[int, Field(ge=1)]
    num_prefill: Count


class NotReady(_Shape):
    status: Literal["not ready: no decode"]
    num_decode: Literal[0]
    num_prefill: Count


class Version(_Shape):
    version: str


class MetricsTarget(_Shape):
    targets: list[str]
    labels: dict[str, str]


class Tokens(_Shape):
    count: Count
    max_model_len: Count = Field(description="Tokens of a prompt and its answer.")
    tokens: list[Count]
    token_strs: list[str] | None = Field(description="Each token as the vocabulary writes it, if that was asked for.")


class Text(_Shape):
    prompt: str


class TokenizerInfo(_Shape):
    """What renders conversations as the server does, and the special tokens that a model may name."""

    tokenizer_class: str
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
