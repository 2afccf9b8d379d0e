"""The HTTP API as an OpenAPI 3.1 document: bodies from schema.py, answers from answer_shapes.py, errors from the tree.

It is of this very server: its models, its limits and whether it wants keys are in it. What no schema can tell (that a
field goes only with another one, that prompt and answer fit the context) is refused with 400.
"""

from __future__ import annotations

import http
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

import shoal
from shoal import errors
from shoal.api import answer_shapes as shapes
from shoal.api import refusals
from shoal.api.access import OPEN
from shoal.api.edge import REQUEST_ID
from shoal.api.endpoint import DEPTH_HEADER, TIMEOUT_HEADER, TIMING_HEADER
from shoal.api.intake import Services
from shoal.api.schema import ChatBody, CompletionBody
from shoal.api.tokenizing import DetokenizeBody, TokenizeBody
from shoal.wire.messages import Depth

Json = dict[str, Any]

_REFUSALS: dict[int, tuple[type[errors.ShoalError], ...]] = {
    400: (
        errors.RequestError, errors.InvalidRequest, errors.ContextLengthExceeded, refusals.InvalidJson,
        errors.MissingField, errors.UnknownField, errors.UnsupportedValue,
    ),
    401: (errors.Unauthenticated,),
    403: (errors.PermissionDenied,),
    404: (errors.ModelNotFound,),
    413: (errors.RequestTooLarge,),
    429: (errors.Overloaded, errors.RateLimited),
    500: (errors.InternalError,),
    503: (errors.Unavailable, errors.PeerGone, errors.OutOfBlocks),
    504: (errors.DeadlineExceeded,),
}  # fmt: skip
"""What clients get; other errors end a start or a command, or are repaired inside."""

_RETRIED = {429, 503}
_KEY = "key"

_BODIES: tuple[type[BaseModel], ...] = (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody)
_ANSWERS: tuple[type[BaseModel], ...] = (
    shapes.Completion, shapes.CompletionChunk, shapes.ChatCompletion, shapes.ChatCompletionChunk, shapes.Model,
    shapes.Models, shapes.Healthy, shapes.Ready, shapes.NotReady, shapes.Version, shapes.MetricsTarget,
    shapes.Tokens, shapes.Text, shapes.TokenizerInfo,
)  # fmt: skip


def openapi_document(services: Services, root_path: str = "") -> Json:
    """``root_path`` is what stands before all paths, where something before this server puts it there."""
    paths = _paths(services)
    for path in paths.keys() & OPEN:
        paths[path]["get"]["security"] = []
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Shoal",
            "version": shoal.__version__,
            "description": "OpenAI's completions and chat completions. null means the same as a field that is left "
            "out; an integer is written without a point.",
            "license": {"name": "Apache 2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": root_path or "/"}],
        "security": [{_KEY: []}] if services.keyring is not None else [],
        "paths": paths,
        "components": {
            "securitySchemes": {_KEY: {"type": "http", "scheme": "bearer"}},
            "parameters": _parameters(),
            "headers": _headers(),
            "responses": {str(status): _refusal(status, services) for status in _REFUSALS},
            "schemas": _schemas(services),
        },
    }


# --- operations -----------------------------------------------------------------------------------------


def _paths(services: Services) -> dict[str, dict[str, Json]]:
    """By path and method."""
    text = _content("text/plain", {"type": "string"})
    targets = _content("application/json", {"type": "array", "items": _ref(shapes.MetricsTarget)})
    itself = _content("application/json", {"type": "object"})
    named = {"type": "string", "enum": _names(services)}
    name = {"name": "name", "in": "path", "required": True, "schema": named}
    model = _reading("getModel", "One of them", _json(shapes.Model), 401, 403, 404)
    model["parameters"].append(name)
    ready = _reading("getReadiness", "Whether somebody can answer", _json(shapes.Ready), 503)
    ready["responses"]["503"] = _not_ready()
    return {
        "/v1/completions": {
            "post": _generating(
                "createCompletion", "Continue texts", CompletionBody, shapes.Completion, shapes.CompletionChunk
            )
        },
        "/v1/chat/completions": {
            "post": _generating(
                "createChatCompletion", "Answer in a conversation", ChatBody, shapes.ChatCompletion,
                shapes.ChatCompletionChunk,
            )
        },
        "/tokenize": {"post": _converting("tokenize", "Token ids of a prompt", TokenizeBody, shapes.Tokens)},
        "/detokenize": {"post": _converting("detokenize", "The text of token ids", DetokenizeBody, shapes.Text)},
        "/tokenizer_info": {
            "get": _reading("getTokenizer", "Chat template and special tokens", _json(shapes.TokenizerInfo), 401, 403)
        },
        "/v1/models": {"get": _reading("listModels", "The models that are served", _json(shapes.Models), 401, 403)},
        "/v1/models/{name}": {"get": model},
        "/health": {"get": _reading("getHealth", "Whether this process works", _json(shapes.Healthy), 503)},
        "/readyz": {"get": ready},
        "/version": {"get": _reading("getVersion", "What this server is", _json(shapes.Version), 401)},
        "/metrics": {"get": _reading("getMetrics", "Metrics of this process, for Prometheus", text, 401, 403)},
        "/metrics/targets": {
            "get": _reading("getMetricsTargets", "Where every process has its metrics", targets, 401, 403)
        },
        "/openapi.json": {"get": _reading("getOpenApi", "This document", itself, 401)},
    }  # fmt: skip


def _converting(name: str, summary: str, body: type[BaseModel], answer: type[BaseModel]) -> Json:
    names = (REQUEST_ID, "traceparent", TIMEOUT_HEADER)
    return {
        "operationId": name,
        "summary": summary,
        "parameters": [_component("parameters", name) for name in names],
        "requestBody": {"required": True, "content": _json(body)},
        "responses": _responses(_json(answer), *_REFUSALS),
    }


def _generating(name: str, summary: str, body: type[BaseModel], whole: type[BaseModel], chunk: type[BaseModel]) -> Json:
    answer = {**_json(whole), **_content("text/event-stream", _event(chunk))}
    names = (REQUEST_ID, "traceparent", DEPTH_HEADER, TIMEOUT_HEADER, TIMING_HEADER)
    return {
        "operationId": name,
        "summary": summary,
        "parameters": [_component("parameters", name) for name in names],
        "requestBody": {"required": True, "content": _json(body)},
        "responses": _responses(answer, *_REFUSALS),
    }


def _reading(name: str, summary: str, content: Json, *refused: int) -> Json:
    return {
        "operationId": name,
        "summary": summary,
        "parameters": [_component("parameters", REQUEST_ID)],
        "responses": _responses(content, *refused, 500),
    }


def _responses(content: Json, *refused: int) -> Json:
    good = {"description": "What was asked for.", "headers": _headers_of(200), "content": content}
    return {"200": good, **{str(status): _component("responses", str(status)) for status in sorted(refused)}}


def _event(chunk: type[BaseModel]) -> Json:
    """Of a stream, each event; OpenAPI has words for that from 3.2 on, and readers of 3.1 take the schema for it."""
    error = _ref("Error")
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": [_ref(chunk), error]}}
    return {
        "description": "Each event. The last one is [DONE], or an Error if the answer fails.",
        "type": "object",
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}},
        "required": ["data"],
    }


def _not_ready() -> Json:
    return {
        "description": "No decode replica is ready, or this process doesn't work.",
        "headers": _headers_of(503),
        "content": _content("application/json", {"anyOf": [_ref(shapes.NotReady), _error_schema(503)]}),
    }


# --- components -----------------------------------------------------------------------------------------


def _parameters() -> Json:
    """Headers of requests, by name."""
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    told: dict[str, tuple[str, Json]] = {
        REQUEST_ID: ("The request's name in logs: up to 128 letters, digits, . _ : -; another one is replaced.", {}),
        "traceparent": ("A W3C trace context; what is none is passed over.", {"examples": [trace]}),
        DEPTH_HEADER: ("depth, for clients that can't add a field; the field wins.", {"enum": [*map(str, Depth)]}),
        TIMEOUT_HEADER: ("Seconds that the client waits.", {"type": "number", "exclusiveMinimum": 0}),
        TIMING_HEADER: ("1: what the request cost is told beside its answer, as shoal.", {"examples": ["1"]}),
    }
    return {
        name: {"name": name, "in": "header", "description": text, "schema": {"type": "string", **schema}}
        for name, (text, schema) in told.items()
    }


def _headers() -> Json:
    """Headers of answers, by name."""
    seconds = {"type": "integer", "minimum": 1}
    told: dict[str, tuple[str, Json]] = {
        REQUEST_ID: ("The client's own, or a new one.", {"type": "string"}),
        "retry-after": ("Seconds until it is worth asking again.", seconds),
        "www-authenticate": ("What a key is sent as.", {"const": "Bearer"}),
    }
    return {name: {"description": text, "required": True, "schema": schema} for name, (text, schema) in told.items()}


def _headers_of(status: int) -> Json:
    names = [REQUEST_ID, *(["retry-after"] if status in _RETRIED else []), *(["www-authenticate"] * (status == 401))]
    return {name: _component("headers", name) for name in names}


def _refusal(status: int, services: Services) -> Json:
    most = f" More than {services.config.max_body_bytes} bytes." if status == 413 else ""
    return {
        "description": f"{http.HTTPStatus(status).phrase}.{most}",
        "headers": _headers_of(status),
        "content": _content("application/json", _error_schema(status)),
    }


def _error_schema(status: int) -> Json:
    """An Error with what is known of it by its status."""
    known = {name: {"enum": sorted({getattr(kind, name) for kind in _REFUSALS[status]})} for name in ("type", "code")}
    return {"allOf": [_ref("Error"), {"properties": {"error": {"properties": known}}}]}


def _schemas(services: Services) -> Json:
    """All bodies and answers, by name."""
    kinds: list[tuple[type[BaseModel], Literal["validation"]]] = [(kind, "validation") for kind in _BODIES + _ANSWERS]
    _, document = models_json_schema(kinds, ref_template="#/components/schemas/{model}", schema_generator=_PlainSchemas)
    schemas: Json = document["$defs"]
    for body in _BODIES:
        _limit(schemas[body.__name__]["properties"], services)
    text = {"type": "string"}
    error = {"message": text, "type": text, "param": {"type": ["string", "null"]}, "code": text}
    schemas["Error"] = _object({"error": _object(error)})
    return schemas


def _limit(fields: Json, services: Services) -> None:
    """Write what the configuration and the models allow into a body's ``fields``."""
    config, models = services.config, services.models
    context = max(model.max_context_tokens for model in models)
    last_id = max(model.vocab_size for model in models) - 1
    for named in _alternatives(fields["model"], "string"):
        named["enum"] = _names(services)
    most = {
        "n": config.max_choices,
        "logprobs": config.max_logprobs,
        "top_logprobs": config.max_logprobs,
        "prompt_logprobs": config.max_logprobs,
    }
    for name, number in most.items():
        for one in _alternatives(fields.get(name, {}), "integer"):
            one["maximum"] = number
    stop = fields.get("stop", {})
    for one in _alternatives(stop, "string"):
        one["maxLength"] = config.max_stop_chars
    for several in _alternatives(stop, "array"):
        several["maxItems"] = config.max_stop_strings
        several["items"]["maxLength"] = config.max_stop_chars
    for messages in _alternatives(fields.get("messages", {}), "array"):
        messages["maxItems"] = min(context, config.max_messages)
    for tokens in _alternatives(fields.get("tokens", {}), "array"):
        tokens["maxItems"] = context
        tokens["items"]["maximum"] = last_id
    for prompts in _alternatives(fields.get("prompt", {}), "array"):
        ids = prompts if prompts["items"]["type"] == "integer" else prompts["items"]
        prompts["maxItems"] = min(config.max_prompts, config.max_running)
        if ids["type"] == "array":  # or it's a text
            ids["maxItems"] = context
            ids["items"]["maximum"] = last_id


def _names(services: Services) -> list[str]:
    return [model.name for model in services.models]


def _alternatives(schema: Mapping[str, Any], kind: str) -> list[Json]:
    return [one for one in schema.get("anyOf", [schema]) if one.get("type") == kind]


class _PlainSchemas(GenerateJsonSchema):
    """Without titles that say what the name says, and without defaults: a ``null`` there stands for another value."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])


# --- words of the document ------------------------------------------------------------------------------


def _ref(kind: type[BaseModel] | str) -> Json:
    return _component("schemas", kind if isinstance(kind, str) else kind.__name__)


def _component(kind: str, name: str) -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}


def _content(media_type: str, schema: Json) -> Json:
    return {media_type: {"schema": schema}}


def _json(kind: type[BaseModel]) -> Json:
    return _content("application/json", _ref(kind))


def _object(properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
