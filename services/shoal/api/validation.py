"""From a checked body to requests for the decode pool: limits, defaults, context length, seed.

One validator for every door: whatever API a request came through, it passes here.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from shoal.api.schema import Body, ChatBody, CompletionBody
from shoal.config import GatewayConfig
from shoal.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound
from shoal.wire.messages import Depth, GenerateRequest, RequestContext, SamplingParams

_SEEDS = 2**63

MAX_TOLD = 1_000_000
"""Log-probabilities of prompts in one answer: as JSON some tenths of a GB, while it's made."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that clients can name. Token ids are ``0..vocab_size-1``; ``created_s`` is Unix time."""

    name: str
    max_context_tokens: int
    vocab_size: int
    default_depth: Depth = Depth.AUTO
    created_s: int = 0


def find_model(models: Collection[ServedModel], name: str) -> ServedModel:
    """Raises ModelNotFound."""
    for model in models:
        if model.name == name:
            return model
    raise ModelNotFound(
        f"this model isn't served here: ask for {' or '.join(model.name for model in models)}",
        param="model",
    )


def check_limits(body: Body, model: ServedModel, config: GatewayConfig) -> None:
    """What can be refused before a text is tokenized. Raises InvalidRequest that names the field."""
    _at_most(body.n, config.max_choices, "n")
    check_num_stops(len(body.stop), config)
    _at_most(max(map(len, body.stop), default=0), config.max_stop_chars, "stop", "characters in one")
    if body.stream_options is not None and body.stream_options.asks and not body.stream:
        raise InvalidRequest("stream_options: only allowed with stream: true", param="stream_options")
    _check_told_of_prompt(body, config)
    if isinstance(body, CompletionBody):
        _at_most(len(body.prompt), min(config.max_prompts, config.max_running), "prompt", "prompts")
        _at_most(body.logprobs, config.max_logprobs, "logprobs")
    if isinstance(body, ChatBody):
        check_num_messages(len(body.messages), model, config)
        _at_most(body.top_logprobs, config.max_logprobs, "top_logprobs")
        if body.top_logprobs and not body.logprobs:
            raise InvalidRequest("top_logprobs: only allowed with logprobs: true", param="top_logprobs")


def check_num_stops(num: int, config: GatewayConfig) -> None:
    """Raises InvalidRequest if so many stop strings are more than are allowed."""
    _at_most(num, config.max_stop_strings, "stop", "strings")


def check_num_messages(num: int, model: ServedModel, config: GatewayConfig) -> None:
    """Raises InvalidRequest if so many turns can't fit the model: each is a token at least, and none free to render."""
    _at_most(num, config.max_messages, "messages", "messages")
    _at_most(num, model.max_context_tokens, "messages", "messages fit the model's context")


def check_num_tokens(num: int, num_new: int, model: ServedModel, param: str) -> None:
    """Raises ContextLengthExceeded unless the model holds a prompt of ``num`` tokens and ``num_new`` more."""
    if num + num_new > model.max_context_tokens:
        raise ContextLengthExceeded(
            f"{param}: {num} tokens and an answer of up to {num_new} are more than the model's context of "
            f"{model.max_context_tokens} tokens: shorten the prompt or lower max_tokens",
            param=param,
        )


def check_are_tokens(ids: Sequence[int], model: ServedModel, param: str) -> None:
    """Raises InvalidRequest for an id outside the vocabulary."""
    if ids and not 0 <= min(ids) <= max(ids) < model.vocab_size:
        raise InvalidRequest(f"{param}: token ids must be 0 to {model.vocab_size - 1}", param=param)


def _check_told_of_prompt(body: Body, config: GatewayConfig) -> None:
    """Fields that ask about the prompt itself, and those that go only, or never, with them."""
    _at_most(body.prompt_logprobs, config.max_logprobs, "prompt_logprobs")
    field = body.needs_full_depth
    if field is None and body.max_new_tokens == 0:
        raise InvalidRequest("max_tokens: at least 1, unless echo or prompt_logprobs is set", param="max_tokens")
    if field is not None and body.depth is Depth.SHALLOW:
        raise InvalidRequest(
            f"depth: {field} needs a prompt at full depth, not a shallow one: leave depth out or ask for full",
            param="depth",
        )
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequest("prompt_logprobs: only allowed without stream: true", param="prompt_logprobs")


def generate_requests(
    body: Body, prompts: Sequence[Sequence[int]], model: ServedModel, context: RequestContext
) -> tuple[GenerateRequest, ...]:
    """One request a prompt, in order; ``prompts`` are their token ids.

    Raises InvalidRequest for an empty prompt, an id outside the vocabulary, or more log-probabilities of prompts than
    an answer may have; ContextLengthExceeded for what the model can't hold.
    """
    requests = []
    for index, ids in enumerate(prompts):
        _check_ids(body, ids, model)
        own = context if len(prompts) == 1 else replace(context, request_id=f"{context.request_id}-{index}")
        requests.append(
            GenerateRequest(own, model.name, tuple(ids), depth_of(body, model), _sampling(body, len(ids), model))
        )
    _check_num_told(body, requests)
    return tuple(requests)


def _check_num_told(body: Body, requests: Sequence[GenerateRequest]) -> None:
    """In JSON that's soon more than the gateway has memory."""
    if body.num_prompt_logprobs is None:
        return
    num_tokens = sum(len(request.prompt_token_ids) for request in requests)
    num_told = num_tokens * (1 + body.num_prompt_logprobs) * body.num_times_told
    if num_told > MAX_TOLD:
        param = body.needs_full_depth or body.prompt_field
        raise InvalidRequest(
            f"{param}: an answer has at most {MAX_TOLD} log-probabilities of prompts, this one would have {num_told}: "
            "ask for fewer prompts, choices or alternatives at a time",
            param=param,
        )


def depth_of(body: Body, model: ServedModel) -> Depth:
    """What the request asks for, else the model's default. ``auto`` is shallow: the prefill pool is there for it.

    What tells of the prompt itself takes the full depth, explicitly: a shallow prompt predicts none of its own tokens.
    """
    if body.needs_full_depth is not None:
        return Depth.FULL
    asked = model.default_depth if body.depth is None else body.depth
    return Depth.SHALLOW if asked is Depth.AUTO else asked


def _at_most(value: int | None, limit: int, param: str, what: str = "") -> None:
    if value is not None and value > limit:
        raise InvalidRequest(f"{param}: at most {limit} {what}".rstrip(), param=param)


def _check_ids(body: Body, ids: Sequence[int], model: ServedModel) -> None:
    param = body.prompt_field
    if not ids:
        raise InvalidRequest(f"{param}: there is nothing to continue, it has no tokens", param=param)
    # Length first: a megabyte of numbers needn't be looked at one by one.
    num_new = 1 if body.max_new_tokens is None else body.max_new_tokens
    check_num_tokens(len(ids), num_new, model, param)
    check_are_tokens(ids, model, param)


def _sampling(body: Body, num_prompt_tokens: int, model: ServedModel) -> SamplingParams:
    max_tokens = body.max_new_tokens
    if max_tokens is None:
        max_tokens = model.max_context_tokens - num_prompt_tokens
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens: at most max_tokens, which is {max_tokens}", param="min_tokens")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),  # -1 is other servers' word for no restriction
        # Fixed here, so that whoever runs this request again continues it alike.
        seed=secrets.randbelow(_SEEDS) if body.seed is None else body.seed % _SEEDS,
        num_choices=body.n or 1,
        num_logprobs=body.num_logprobs,
        num_prompt_logprobs=body.num_prompt_logprobs,
        stop=body.stop,
        min_tokens=min_tokens,
        ignore_eos=bool(body.ignore_eos),
        may_shorten=body.max_new_tokens is None,
    )
