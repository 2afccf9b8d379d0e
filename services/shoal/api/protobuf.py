"""The messages of ``shoal.v1.InferenceService``: requests to the bodies that HTTP has too, outputs to answers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any

from google.protobuf.message import DecodeError

from shoal.api.answers import Choice, whole_choices
from shoal.api.generation import ChoiceOutput, Generation
from shoal.api.schema import ChatBody, GenerateBody, check
from shoal.api.validation import ServedModel, check_num_messages, check_num_stops, check_num_tokens
from shoal.config import GatewayConfig
from shoal.errors import InvalidRequest, MissingField, UnknownField
from shoal.v1 import inference_pb2 as pb
from shoal.wire.outputs import DEPTHS, DEPTHS_BACK, to_finish_reason, to_logprobs

# Fields of bodies that GenerateRequest has under another name.
_CHAT_NAMES = {"messages": "chat.messages", "top_logprobs": "logprobs"}


# --- in -------------------------------------------------------------------------------------------------


def read_request(raw: bytes) -> pb.GenerateRequest:
    """Raises InvalidRequest unless ``raw`` is one."""
    try:
        return pb.GenerateRequest.FromString(raw)
    except DecodeError:
        raise InvalidRequest("the message isn't a shoal.v1.GenerateRequest: compare the client's .proto") from None


def to_body(request: pb.GenerateRequest, model: ServedModel, config: GatewayConfig) -> GenerateBody | ChatBody:
    """The body that ``request`` to ``model`` stands for.

    Raises an InvalidRequest in the body's words: see ``in_grpc_words``.
    """
    _check_counts(request, model, config)
    _check_known(request)
    # Whatever is set goes to the validator: no field is passed over in silence.
    fields: dict[str, Any] = {field.name: value for field, value in request.ListFields()}
    fields["model"] = model.name
    fields["stop"] = list(request.stop)
    if request.depth:
        fields["depth"] = DEPTHS_BACK.get(request.depth, request.depth)
    match request.WhichOneof("prompt"):
        case "chat":
            turns = fields.pop("chat").messages
            fields["messages"] = [{"role": turn.role, "content": turn.content} for turn in turns]
            if "logprobs" in fields:
                fields |= {"logprobs": True, "top_logprobs": request.logprobs}
            return check(ChatBody, fields)
        case "token_ids":
            fields["prompt"] = list(fields.pop("token_ids").ids)
        case "text":
            fields["prompt"] = fields.pop("text")
        case None:
            raise MissingField("prompt is missing: set text, token_ids or chat", param="prompt")
    return check(GenerateBody, fields)


def _check_counts(request: pb.GenerateRequest, model: ServedModel, config: GatewayConfig) -> None:
    """What the validator would refuse for its length: a message holds millions of items, and none is converted."""
    check_num_stops(len(request.stop), config)
    check_num_messages(len(request.chat.messages), model, config)
    if len(request.token_ids.ids) >= model.max_context_tokens:
        is_said = request.HasField("max_tokens") and request.max_tokens >= 0
        num_new = request.max_tokens if is_said else 1
        check_num_tokens(len(request.token_ids.ids), num_new, model, "prompt")


def _check_known(request: pb.GenerateRequest) -> None:
    """Raises UnknownField for one that this version's .proto doesn't have, in ``request`` or what it holds."""
    known = pb.GenerateRequest()
    known.CopyFrom(request)
    known.DiscardUnknownFields()
    # By their bytes: a message holds a million unknown fields, and listing them would make an object of each.
    if known.ByteSize() != request.ByteSize():
        raise UnknownField(
            "the message has a field that this server's shoal.v1.GenerateRequest lacks: compare the client's .proto, "
            "or leave the field out"
        )


def in_grpc_words(error: InvalidRequest, request: pb.GenerateRequest) -> InvalidRequest:
    """``error`` with the field named as it is in ``request``."""
    prompt = request.WhichOneof("prompt")
    names = _CHAT_NAMES if prompt == "chat" else {"prompt": prompt or "prompt"}
    old = error.param or ""
    for name, ours in names.items():
        if old == name or old.startswith((f"{name}.", f"{name}[")):
            new = ours + old.removeprefix(name)
            message = new + error.message.removeprefix(old) if error.message.startswith(old) else error.message
            return type(error)(message, param=new)
    return error


# --- out ------------------------------------------------------------------------------------------------


class InferenceAnswer:
    """What one call gets: ``whole`` at once, or ``messages`` as they come. Use one of the two, once."""

    def __init__(self, generation: Generation, model: str, request_id: str) -> None:
        self._generation = generation
        self._model = model
        self.request_id = request_id

    async def whole(self) -> pb.GenerateResponse:
        """The answer of Generate."""
        choices = await whole_choices(self._generation)
        return pb.GenerateResponse(
            request_id=self.request_id,
            model=self._model,
            choices=[_choice(choice, self._generation.token_ids[choice.index]) for choice in choices],
            usage=_usage(self._generation),
            prompt_logprobs=to_logprobs(self._generation.prompts[0].logprobs),
        )

    async def messages(self) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """The messages of GenerateStream, one an output."""
        async with aclosing(self._generation.outputs()) as outputs:
            async for one in outputs:
                yield self._message(one)

    def _message(self, one: ChoiceOutput) -> pb.GenerateStreamResponse:
        output = one.output
        return pb.GenerateStreamResponse(
            request_id=self.request_id,
            model=self._model,
            index=one.index,
            text=one.text,
            token_ids=output.token_ids,
            finish_reason=to_finish_reason(output.finish_reason),
            stop=_stop(output.stop_reason),
            logprobs=to_logprobs(output.logprobs),
            usage=_usage(self._generation) if one.is_last else None,
            prompt_logprobs=to_logprobs(output.prompt_logprobs),
        )


def models_response(models: Iterable[ServedModel]) -> pb.ListModelsResponse:
    """The answer of ListModels."""
    return pb.ListModelsResponse(
        models=[
            pb.Model(name=model.name, max_context_tokens=model.max_context_tokens, created_s=model.created_s)
            for model in models
        ]
    )


def _choice(choice: Choice, token_ids: Iterable[int]) -> pb.Choice:
    return pb.Choice(
        index=choice.index,
        text=choice.text,
        token_ids=token_ids,
        finish_reason=to_finish_reason(choice.finish_reason),
        stop=_stop(choice.stop_reason),
        logprobs=to_logprobs(choice.logprobs),
    )


def _stop(reason: str | int | None) -> str | None:
    return reason if isinstance(reason, str) else None  # a token's id says no more than the token itself


def _usage(generation: Generation) -> pb.Usage:
    return pb.Usage(
        num_prompt_tokens=generation.num_prompt_tokens,
        num_output_tokens=generation.num_completion_tokens,
        num_cached_tokens=generation.num_cached_tokens,
        depth=DEPTHS[generation.depth],
    )
