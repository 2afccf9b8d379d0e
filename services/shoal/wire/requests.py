"""A request that a gateway brings to decode, to protobuf and back (proto/shoal/v1/worker.proto); what comes in is
checked here.

Numbers are in the bounds that the layers below rely on. What a client may ask is for the gateway to say, and what the
model holds for the engine.
"""

from __future__ import annotations

import math
from dataclasses import asdict

from google.protobuf.message import Message

from shoal.errors import ProtocolViolation, RequestTooLarge, Unavailable
from shoal.v1 import worker_pb2 as pb
from shoal.wire.messages import (
    Depth,
    GenerateRequest,
    PromptOutline,
    RequestContext,
    Resumption,
    SamplingParams,
    SentChoice,
)
from shoal.wire.options import HANDOFF_MAX_MESSAGE_BYTES
from shoal.wire.outputs import DEPTHS, DEPTHS_BACK
from shoal.wire.values import MAX_ID, checked_ids, checked_text, value_of

MAX_CHOICES = 1024
MAX_INT64 = (1 << 63) - 1


def to_submit(gateway_id: bytes, key: int, server_id: bytes, request: GenerateRequest) -> pb.SubmitRequest:
    """Raises RequestTooLarge if no message holds it, and Unavailable if that is for what was answered so far."""
    resumption = request.resumption
    message = pb.SubmitRequest(
        gateway_id=gateway_id,
        key=key,
        server_id=server_id,
        context=pb.RequestContext(**asdict(request.context)),
        model=request.model,
        prompt_token_ids=request.prompt_token_ids,
        depth=DEPTHS[request.depth],
        sampling=pb.SamplingParams(**asdict(request.sampling)),
        outline=pb.PromptOutline(**asdict(request.outline)),
        resumption=None if resumption is None else pb.Resumption(**asdict(resumption)),
    )
    if message.ByteSize() > HANDOFF_MAX_MESSAGE_BYTES:
        if resumption is not None:
            raise Unavailable(
                "the answer has too many tokens to go on at another decode replica: ask again", retry_after_s=1.0
            )
        raise RequestTooLarge("the prompt has too many tokens to be brought to decode")
    return message


def from_submit(message: pb.SubmitRequest) -> GenerateRequest:
    """Raises ProtocolViolation unless it's well formed."""
    prompt = checked_ids(message.prompt_token_ids, "request.prompt_token_ids")
    if not prompt:
        raise ProtocolViolation("a request has no token to continue")
    depth = DEPTHS_BACK.get(message.depth)
    if depth not in {Depth.SHALLOW, Depth.FULL}:
        raise ProtocolViolation(f"request.depth is {message.depth}: neither shallow nor full")
    sampling = _from_sampling(message.sampling)
    return GenerateRequest(
        context=_from_context(message.context),
        model=checked_text(message.model, "request.model"),
        prompt_token_ids=prompt,
        depth=depth,
        sampling=sampling,
        outline=_from_outline(message.outline, len(prompt)),
        resumption=_from_resumption(message.resumption, sampling) if message.HasField("resumption") else None,
    )


def _from_context(message: pb.RequestContext) -> RequestContext:
    return RequestContext(
        request_id=checked_text(message.request_id, "request.request_id"),
        timeout_s=_number(message, "timeout_s", 0, math.inf),
        tenant=checked_text(message.tenant, "request.tenant"),
        attempt=_count(message, "attempt", at_least=1),
        traceparent=(
            checked_text(message.traceparent, "request.traceparent") if message.HasField("traceparent") else None
        ),
    )


def _from_sampling(message: pb.SamplingParams) -> SamplingParams:
    max_tokens = _count(message, "max_tokens")
    stop = tuple(message.stop)
    if "" in stop:
        raise ProtocolViolation("an empty string stops nothing")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_number(message, "temperature", 0, math.inf),
        top_p=_number(message, "top_p", 0, 1),
        top_k=_count(message, "top_k", at_most=MAX_INT64),
        seed=_count(message, "seed", at_most=MAX_INT64),
        num_choices=_count(message, "num_choices", at_least=1, at_most=MAX_CHOICES),
        num_logprobs=_count(message, "num_logprobs") if message.HasField("num_logprobs") else None,
        num_prompt_logprobs=(
            _count(message, "num_prompt_logprobs") if message.HasField("num_prompt_logprobs") else None
        ),
        stop=stop,
        stop_token_ids=checked_ids(message.stop_token_ids, "request.stop_token_ids"),
        min_tokens=_count(message, "min_tokens", at_most=max_tokens),
        ignore_eos=message.ignore_eos,
        may_shorten=message.may_shorten,
    )


def _from_outline(message: pb.PromptOutline, num_prompt_tokens: int) -> PromptOutline:
    if message.num_system_tokens + message.num_header_tokens > num_prompt_tokens:
        raise ProtocolViolation("the prompt's parts are longer than the prompt")
    return PromptOutline(message.num_system_tokens, message.num_header_tokens)


def _from_resumption(message: pb.Resumption, sampling: SamplingParams) -> Resumption:
    choices = tuple(
        SentChoice(checked_ids(one.token_ids, "request.token_ids"), one.is_complete) for one in message.choices
    )
    if len(choices) != sampling.num_choices or all(one.is_complete for one in choices):
        raise ProtocolViolation("an answer that goes on has all choices of its request, and not each is complete")
    if any(len(one.token_ids) >= max(1, sampling.max_tokens) for one in choices if not one.is_complete):
        raise ProtocolViolation("an answer that is as long as it may be doesn't go on")
    return Resumption(checked_text(message.plan_hash, "request.plan_hash"), choices)


# --- one value ------------------------------------------------------------------------------------------


def _count(message: Message, name: str, *, at_least: int = 0, at_most: int = MAX_ID) -> int:
    value: int = value_of(message, name)
    if not at_least <= value <= at_most:
        raise ProtocolViolation(f"request.{name} is {value}: not {at_least} to {at_most}")
    return value


def _number(message: Message, name: str, at_least: float, at_most: float) -> float:
    value: float = value_of(message, name)
    if not (math.isfinite(value) and at_least <= value <= at_most):
        raise ProtocolViolation(f"request.{name} is {value}: not {at_least:g} to {at_most:g}")
    return value
