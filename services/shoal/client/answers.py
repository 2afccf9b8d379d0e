"""Protobuf to values. Of a newer server, what this version doesn't know is passed over."""

from __future__ import annotations

import math
from collections.abc import Iterable

from shoal.client.values import Choice, Completion, Delta, Model, Usage
from shoal.errors import InternalError
from shoal.v1 import inference_pb2 as pb
from shoal.wire.messages import Depth, FinishReason, TokenLogprob

_DEPTHS = {pb.DEPTH_AUTO: Depth.AUTO, pb.DEPTH_SHALLOW: Depth.SHALLOW, pb.DEPTH_FULL: Depth.FULL}
_FINISH_REASONS = {pb.FINISH_REASON_STOP: FinishReason.STOP, pb.FINISH_REASON_LENGTH: FinishReason.LENGTH}


class StreamedAnswer:
    """What a stream has told beside its deltas."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        """Names the request in the server's logs."""
        self.usage: Usage | None = None
        """What the request took; ``None`` before the end."""
        self.prompt_logprobs: tuple[TokenLogprob, ...] = ()
        """If asked for, of each prompt token but the first; there with the first delta."""

    def _take(self, message: pb.GenerateStreamResponse) -> Delta:
        self.request_id = message.request_id or self.request_id
        if message.HasField("usage"):
            self.usage = _usage(message.usage)
        if message.prompt_logprobs:
            self.prompt_logprobs = _logprobs(message.prompt_logprobs)
        return Delta(
            index=message.index,
            text=message.text,
            token_ids=tuple(message.token_ids),
            finish_reason=_FINISH_REASONS.get(message.finish_reason),
            stop=message.stop if message.HasField("stop") else None,
            logprobs=_logprobs(message.logprobs),
        )


def to_completion(response: pb.GenerateResponse) -> Completion:
    """The answer of Generate. Raises InternalError if it holds no choice."""
    if not response.choices:
        raise InternalError("the server sent an answer without choices: its version may not fit this client's")
    return Completion(
        choices=tuple(_choice(choice) for choice in response.choices),
        usage=_usage(response.usage),
        model=response.model,
        request_id=response.request_id,
        prompt_logprobs=_logprobs(response.prompt_logprobs),
    )


def to_models(response: pb.ListModelsResponse) -> tuple[Model, ...]:
    """The answer of ListModels."""
    return tuple(Model(model.name, model.max_context_tokens, model.created_s) for model in response.models)


def _choice(choice: pb.Choice) -> Choice:
    return Choice(
        index=choice.index,
        text=choice.text,
        token_ids=tuple(choice.token_ids),
        finish_reason=_FINISH_REASONS.get(choice.finish_reason),
        stop=choice.stop if choice.HasField("stop") else None,
        logprobs=_logprobs(choice.logprobs),
    )


def _usage(usage: pb.Usage) -> Usage:
    return Usage(
        num_prompt_tokens=usage.num_prompt_tokens,
        num_output_tokens=usage.num_output_tokens,
        num_cached_tokens=usage.num_cached_tokens,
        depth=_DEPTHS.get(usage.depth),
    )


def _logprobs(tokens: Iterable[pb.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            token_id=one.token_id,
            token=one.token,
            logprob=_logprob(one),
            top=tuple((other.token_id, other.token, _logprob(other)) for other in one.top),
        )
        for one in tokens
    )


def _logprob(one: pb.TokenLogprob | pb.TopToken) -> float:
    return one.logprob if one.HasField("logprob") else -math.inf
