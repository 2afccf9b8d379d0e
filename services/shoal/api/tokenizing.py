"""/tokenize, /detokenize and /tokenizer_info: the model's own tokenizer, for clients that don't have it; as vLLM's."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BeforeValidator, FailFast, Field
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Scope, Send

from shoal.api.endpoint import Endpoint, timeout_of
from shoal.api.exchange import Exchange
from shoal.api.intake import Services
from shoal.api.schema import Message, Strict, parse
from shoal.api.validation import ServedModel, check_are_tokens, check_num_messages, find_model
from shoal.errors import ContextLengthExceeded, InvalidRequest, MissingField

B = TypeVar("B", bound=Strict)


class TokenizeBody(Strict):
    """POST /tokenize: a text or a conversation. ``model`` may be left out, as one is served."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[
        list[Message],
        FailFast(),
        BeforeValidator(lambda value: [] if value is None else value, json_schema_input_type=list[Message] | None),
    ] = Field(default_factory=list)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Strict):
    """POST /detokenize"""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], FailFast()]


class Tokenize(Endpoint):
    """Token ids of what a request would send, by the same way."""

    async def _answer(self, scope: Scope, raw: bytes, _send: Send, exchange: Exchange) -> ASGIApp:
        body = _parsed(TokenizeBody, raw, scope)
        model = _named(body.model, self._services, exchange)
        tokenizer = self._services.tokenizer
        ids = await _encode(body, model, self._services)
        pieces = await tokenizer.pieces(ids) if body.return_token_strs else None
        return JSONResponse(
            {"count": len(ids), "max_model_len": model.max_context_tokens, "tokens": ids, "token_strs": pieces}
        )


class Detokenize(Endpoint):
    """The text of token ids, special ones included."""

    async def _answer(self, scope: Scope, raw: bytes, _send: Send, exchange: Exchange) -> ASGIApp:
        body = _parsed(DetokenizeBody, raw, scope)
        model = _named(body.model, self._services, exchange)
        if len(body.tokens) > model.max_context_tokens:
            raise InvalidRequest(f"tokens: at most {model.max_context_tokens}, the model's context", param="tokens")
        check_are_tokens(body.tokens, model, "tokens")
        text = await self._services.tokenizer.decode_whole(body.tokens)
        return JSONResponse({"prompt": text})


def _parsed(kind: type[B], raw: bytes, scope: Scope) -> B:
    body = parse(kind, raw)
    timeout_of(Headers(scope=scope))  # which holds already, if it's one
    return body


def _named(name: str | None, services: Services, exchange: Exchange) -> ServedModel:
    model = services.models[0] if name is None else find_model(services.models, name)
    exchange.model = model.name
    return model


async def _encode(body: TokenizeBody, model: ServedModel, services: Services) -> tuple[int, ...]:
    tokenizer, most = services.tokenizer, model.max_context_tokens
    if not body.messages:
        if body.prompt is None:
            raise MissingField("prompt or messages is missing: one of them is required", param="prompt")
        if body.add_generation_prompt is not None:
            raise InvalidRequest("add_generation_prompt: only allowed with messages", param="add_generation_prompt")
        with_special = body.add_special_tokens is not False
        ids = await tokenizer.encode(body.prompt, max_tokens=most, add_special_tokens=with_special)
        return _fitting(ids, model, "prompt")
    if body.prompt is not None:
        raise InvalidRequest("prompt: not allowed with messages: send one of them", param="prompt")
    if body.add_special_tokens:
        raise InvalidRequest(
            "add_special_tokens: not with messages: the template writes them", param="add_special_tokens"
        )
    check_num_messages(len(body.messages), model, services.config)
    opens_answer = body.add_generation_prompt is not False
    ids = await tokenizer.encode_chat(body.messages, max_tokens=most, opens_answer=opens_answer)
    return _fitting(ids, model, "messages")


def _fitting(ids: tuple[int, ...], model: ServedModel, param: str) -> tuple[int, ...]:
    """What no request could send isn't told token by token: that would take the event loop's time from others."""
    if len(ids) > model.max_context_tokens:
        raise ContextLengthExceeded(
            f"{param}: {len(ids)} tokens are more than the model's context of {model.max_context_tokens} tokens: "
            "shorten the prompt",
            param=param,
        )
    return ids
