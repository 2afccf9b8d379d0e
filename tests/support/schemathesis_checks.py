"""What schemathesis shall check of the gateway beside its own checks; it loads this in a process of its own.

No schema tells which fields go together, nor how many tokens a text has: a body that fits the document may be refused,
but only for one of these reasons.
"""

from __future__ import annotations

from typing import Any

import schemathesis
from schemathesis import Case, CheckContext, GenerationMode, HookContext, Response

REFUSED_ALL_THE_SAME = (
    "depth: echo needs a prompt at full depth",
    "depth: prompt_logprobs needs a prompt at full depth",
    "min_tokens: at most max_tokens",
    "prompt: there is nothing to continue",
    "are more than the model's context",
    # Of /tokenize, which takes a text or a conversation.
    "prompt or messages is missing",
    "prompt: not allowed with messages",
    "add_generation_prompt: only allowed with messages",
    "add_special_tokens: not with messages",
)
UNKNOWN_HEADER = "x-schemathesis-unknown-property"


@schemathesis.hook
def filter_case(context: HookContext, case: Case) -> bool:
    """A header that nobody knows is no mistake, and schemathesis takes it for one where another one is a number."""
    return UNKNOWN_HEADER not in case.headers


@schemathesis.hook
def before_call(context: HookContext, case: Case, kwargs: Any) -> None:
    """1.0 is an integer to JSON Schema, and none here: send 1."""
    body = _with_plain_integers(case.body)
    case.body = _with_fitting_fields(body) if _is_good(case) and isinstance(body, dict) else body


def _with_fitting_fields(body: dict[str, Any]) -> dict[str, Any]:
    """Or most streams, for one, would be refused: fields are many, and some go only with, or without, another one."""
    if body.get("stream_options") is not None:
        body["stream"] = True
    if body.get("stream"):
        body.pop("prompt_logprobs", None)
    if body.get("top_logprobs") is not None:
        body["logprobs"] = True
    if body.get("max_tokens") == 0 and body.get("prompt_logprobs") is None:
        body["max_tokens"] = 1
    return body


def _is_good(case: Case) -> bool:
    return case.meta is not None and case.meta.generation.mode is GenerationMode.POSITIVE


def _with_plain_integers(value: Any) -> Any:
    match value:
        case dict():
            return {key: _with_plain_integers(one) for key, one in value.items()}
        case list():
            return [_with_plain_integers(one) for one in value]
        case float():
            return int(value) if value.is_integer() else value
    return value


@schemathesis.check
def refused_for_a_reason(ctx: CheckContext, response: Response, case: Case) -> None:
    """What fits the document is answered, or refused for what no document can tell."""
    if not _is_good(case) or response.status_code == 200:
        return
    assert response.status_code == 400, f"a good request got {response.status_code}: {response.text}"
    message = response.json()["error"]["message"]
    assert any(reason in message for reason in REFUSED_ALL_THE_SAME), f"a good request was refused: {message}"


@schemathesis.check
def stream_has_an_end(ctx: CheckContext, response: Response, case: Case) -> None:
    """What its events are is checked by the document; that the last one, and no other, is the end, by nothing else."""
    if response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        *events, end, nothing = response.text.split("\n\n")
        assert (end, nothing) == ("data: [DONE]", "")
        assert events and end not in events
