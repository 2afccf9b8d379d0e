"""The bodies of ``/v1/completions`` and ``/v1/chat/completions``, checked field by field; gRPC's requests become such.

Types are strict (``"1"`` is no number, ``true`` no integer) and a field that isn't here is refused. ``null`` means
the same as a field that is left out. What depends on the configuration or the model is in validation.py. A field with a
validator of its own says beside it what the OpenAPI document tells (openapi.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from shoal.api.refusals import InvalidJson
from shoal.errors import InvalidRequest, MissingField, UnknownField, UnsupportedValue
from shoal.wire.messages import Depth

# OpenAI's fields that change nothing about the tokens: accepted, and ignored.
IGNORED_FIELDS = frozenset(
    {
        "metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_options",
        "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user",
    }
)  # fmt: skip

Prompt = str | tuple[int, ...]
"""Text to be encoded, or token ids."""

T = TypeVar("T")

_JSON_TYPES = {
    type(None): "null", bool: "boolean", int: "number", str: "string", list: "array", dict: "object",
}  # fmt: skip
_MAX_NAME_CHARS = 64
_MAX_FAULTS = 1000
_MAX_INT64 = 2**63 - 1


# --- values ---------------------------------------------------------------------------------------------


def _only(*neutral: object) -> PlainValidator:
    """Accepts a field only at the values that ask for nothing."""

    def check(value: object) -> object:
        # bool is an int to Python: false must not pass for a penalty of 0.
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral):
            raise PydanticCustomError("unsupported_value", "this server doesn't support it: leave the field out")
        return value

    # Without their types, 0 and false would be the same to whoever keeps schemas by what they hold.
    schema = {"type": sorted({_JSON_TYPES[type(one)] for one in neutral}), "enum": [*neutral]}
    return PlainValidator(check, json_schema_input_type=Annotated[Any, WithJsonSchema(schema)])


def _wrong(message: Literal["stop", "prompt", "content"]) -> PydanticCustomError:
    return PydanticCustomError("wrong_type", _EXPECTED[message])


_EXPECTED = {
    "stop": "must be a string or a list of strings, none of them empty",
    "prompt": "must be a string, a list of strings, a list of token ids, or a list of lists of token ids; none empty",
    "content": 'must be a string or a list of parts such as {"type": "text", "text": "…"}',
}


def _stop(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(string, str) and string for string in strings):
        raise _wrong("stop")
    return tuple(strings)


def _prompts(value: object) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise _wrong("prompt")
    types = set(map(type, value))
    if types == {int}:
        return (tuple(value),)
    if types == {str} and all(value):
        return tuple(value)
    if types == {list} and all(set(map(type, ids)) == {int} for ids in value):
        return tuple(tuple(ids) for ids in value)
    raise _wrong("prompt")


def _one_prompt(value: str | list[int]) -> tuple[Prompt, ...]:
    if not value:
        raise PydanticCustomError("wrong_type", "must not be empty")
    return (value if isinstance(value, str) else tuple(value),)


def _role(value: object) -> object:
    return "system" if value == "developer" else value  # OpenAI's newer word for it


def _content(value: object) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value or not all(isinstance(part, dict) for part in value):
        raise _wrong("content")
    for part in value:
        if part.get("type") != "text":
            raise PydanticCustomError("unsupported_value", "this model reads text only: send parts of type text")
        if unknown := part.keys() - TextPart.model_fields.keys():
            name = min(unknown)[:_MAX_NAME_CHARS]
            raise PydanticCustomError("wrong_type", "a part has no field {name}: leave it out", {"name": name})
        if not isinstance(part.get("text"), str):
            raise _wrong("content")
    return "\n".join(part["text"] for part in value)


Ignored = Annotated[Any, PlainValidator(lambda _: None)]
Count = Annotated[int, Field(ge=1)]

# What JSON brings where a validator above makes something else of it.
_Some = Annotated[T, Field(min_length=1)]
_Ids = _Some[list[Annotated[int, Field(ge=0)]]]
_PromptJson = _Some[str] | _Some[list[_Some[str]]] | _Ids | _Some[list[_Ids]]
_StopJson = _Some[str] | list[_Some[str]] | None


# --- bodies ---------------------------------------------------------------------------------------------


class Strict(BaseModel):
    """What all that comes as JSON is."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str
    # What clients add for other servers.
    annotations: Ignored = None
    cache_control: Ignored = None


class StreamOptions(Strict):
    """``include_usage`` adds a last chunk with the counts, ``continuous_usage_stats`` counts in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Ignored = None

    @property
    def asks(self) -> bool:
        """For anything."""
        return bool(self.include_usage or self.continuous_usage_stats)


class Message(Strict):
    """One turn of a conversation. ``content`` is its text; several text parts become lines."""

    role: Annotated[
        Literal["system", "user", "assistant"],
        BeforeValidator(_role, json_schema_input_type=Literal["system", "developer", "user", "assistant"]),
    ]
    content: Annotated[str, PlainValidator(_content, json_schema_input_type=str | _Some[list[TextPart]])]
    name: str | None = None
    type: Literal["text"] | None = None  # lm-eval's
    # What an assistant's message that a client sends back carries.
    annotations: Annotated[Any, _only(None, [])] = None
    audio: Annotated[Any, _only(None)] = None
    function_call: Annotated[Any, _only(None)] = None
    provider_specific_fields: Ignored = None
    reasoning: Ignored = None
    reasoning_content: Ignored = None
    reasoning_details: Ignored = None
    refusal: Annotated[Any, _only(None)] = None
    tool_calls: Annotated[Any, _only(None, [])] = None


class Body(Strict):
    """What both endpoints understand. ``None`` stands for the default, also where a client sends ``null``."""

    prompt_field: ClassVar[str]

    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Count | None = None
    seed: Annotated[int, Field(ge=-_MAX_INT64 - 1, le=_MAX_INT64)] | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(_stop, json_schema_input_type=_StopJson)] = ()
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_MAX_INT64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    depth: Depth | None = None
    prompt_logprobs: Annotated[int, Field(ge=0)] | None = None

    cache_salt: Annotated[Any, _only(None)] = None
    frequency_penalty: Annotated[Any, _only(None, 0)] = None
    include_stop_str_in_output: Annotated[Any, _only(None, False)] = None
    length_penalty: Annotated[Any, _only(None, 1)] = None
    logit_bias: Annotated[Any, _only(None, {})] = None
    min_p: Annotated[Any, _only(None, 0)] = None
    presence_penalty: Annotated[Any, _only(None, 0)] = None
    repetition_penalty: Annotated[Any, _only(None, 1)] = None
    skip_special_tokens: Annotated[Any, _only(None, True)] = None
    spaces_between_special_tokens: Annotated[Any, _only(None, True)] = None
    stop_token_ids: Annotated[Any, _only(None, [])] = None
    typical_p: Annotated[Any, _only(None, 1)] = None
    use_beam_search: Annotated[Any, _only(None, False)] = None

    metadata: Ignored = None
    parallel_tool_calls: Ignored = None
    prediction: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None
    user: Ignored = None

    @property
    def max_new_tokens(self) -> int | None:
        """``None``: what the endpoint does by default."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report for each token; ``None`` for no log-probabilities at all."""
        raise NotImplementedError

    @property
    def num_times_told(self) -> int:
        """How many times the answer has the log-probabilities of a prompt."""
        return 1

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the prompt's tokens."""
        return self.prompt_logprobs

    @property
    def needs_full_depth(self) -> str | None:
        """The field because of which the prompt is encoded at full depth, whatever the model's default."""
        return None if self.prompt_logprobs is None else "prompt_logprobs"


class CompletionBody(Body):
    """POST /v1/completions. ``prompt`` has one item a prompt."""

    prompt_field = "prompt"

    prompt: Annotated[tuple[Prompt, ...], PlainValidator(_prompts, json_schema_input_type=_PromptJson)]
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    best_of: Annotated[Any, _only(None, 1)] = None
    suffix: Annotated[Any, _only(None, "")] = None

    @property
    def max_new_tokens(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Asked for in both ways, the larger number counts."""
        return max(self._asked_of_prompt, default=None)

    @property
    def num_times_told(self) -> int:
        return len(self._asked_of_prompt) * (self.n or 1)

    @property
    def _asked_of_prompt(self) -> list[int]:
        asked = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return [number for number in asked if number is not None]

    @property
    def needs_full_depth(self) -> str | None:
        return "echo" if self.echo else super().needs_full_depth


class GenerateBody(CompletionBody):
    """Text or token ids that come by gRPC: one prompt, and an answer as long as the context allows by default."""

    prompt: Annotated[tuple[Prompt, ...], PlainValidator(_one_prompt)]

    @property
    def num_times_told(self) -> int:
        return 1

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens


class ChatBody(Body):
    """POST /v1/chat/completions. ``max_completion_tokens`` is the newer name of ``max_tokens`` and wins."""

    prompt_field = "messages"

    # A body holds two million wrong turns, and only the first is told: no errors are built for the others.
    messages: Annotated[list[Message], FailFast(), Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    add_generation_prompt: Annotated[Any, _only(None, True)] = None
    audio: Annotated[Any, _only(None)] = None
    function_call: Annotated[Any, _only(None, "none")] = None
    functions: Annotated[Any, _only(None, [])] = None
    modalities: Annotated[Any, _only(None, ["text"])] = None
    moderation: Annotated[Any, _only(None)] = None
    reasoning_effort: Annotated[Any, _only(None, "none")] = None
    response_format: Annotated[Any, _only(None, {"type": "text"})] = None
    tool_choice: Annotated[Any, _only(None, "none", "auto")] = None
    tools: Annotated[Any, _only(None, [])] = None
    verbosity: Annotated[Any, _only(None)] = None
    web_search_options: Annotated[Any, _only(None)] = None

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def may_think(self) -> bool:
        """Whether a model that can think before it answers may."""
        return self.reasoning_effort is None


# --- parsing --------------------------------------------------------------------------------------------

B = TypeVar("B", bound=Strict)
V = TypeVar("V")


def parse(kind: type[B], raw: bytes) -> B:
    """``raw`` JSON as a body. Raises an InvalidRequest that names the first wrong field and what it should be."""
    return _valid(kind.model_validate_json, raw)


def check(kind: type[B], fields: dict[str, Any]) -> B:
    """The same for values that never were JSON."""
    return _valid(kind.model_validate, fields)


def _valid(validate: Callable[[V], B], value: V) -> B:
    try:
        return validate(value)
    except ValidationError as error:
        if error.error_count() > _MAX_FAULTS:  # to describe each would take the event loop for long
            raise InvalidRequest(f"the body has more than {_MAX_FAULTS} wrong fields") from None
        raise _refusal(error.errors(include_url=False, include_input=False)[0]) from None


def _refusal(detail: ErrorDetails) -> InvalidRequest:
    param, message = _param(detail["loc"]), detail["msg"]
    match detail["type"]:
        case "json_invalid":
            return InvalidJson(f"the body isn't valid JSON: {message.removeprefix('Invalid JSON: ')}")
        case "model_type" if param is None:
            return InvalidRequest("the body must be a JSON object")
        case "missing":
            return MissingField(f"{param} is missing: it is required", param=param)
        case "extra_forbidden":
            return UnknownField(f"{param} is not a field of this endpoint: check its name or leave it out", param=param)
    kind: Callable[..., InvalidRequest] = UnsupportedValue if detail["type"] == "unsupported_value" else InvalidRequest
    return kind(f"{param}: {message[:1].lower()}{message[1:]}", param=param)


def _param(location: tuple[int | str, ...]) -> str | None:
    """``("messages", 0, "role")`` as ``messages[0].role``."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part[:_MAX_NAME_CHARS]}"
    return path.removeprefix(".") or None
