"""Which chunks are tokens, who counts them, and what ends an answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shoal_lab.bench.answer import Answer, RequestFailed, error_message
from shoal_lab.bench.record import Failure, TokenSource
from shoal_lab.bench.sse import Event


def answer(*documents: Any) -> Answer:
    """One event a second, from second 1 on."""
    found = Answer()
    for now_s, document in enumerate(documents, start=1):
        found.add(Event("message", document if isinstance(document, str) else json.dumps(document)), float(now_s))
    return found


def text(word: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"text": word, "finish_reason": finish_reason}]}


def chat(finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"delta": delta, "finish_reason": finish_reason}]}


def usage(prompt: Any, completion: Any) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


def test_tokens_are_timed_and_counted_by_usage_where_there_is_one():
    found = answer(text(" one two"), text(" three"), "{}", text(" four"), usage(5, 4), "[DONE]")
    assert (found.first_s, found.last_s, found.gaps_s, found.is_done) == (1, 4, [1, 2], True)
    assert (found.prompt_tokens, found.output_tokens, found.tokens_from) == (5, 4, TokenSource.USAGE)


@pytest.mark.parametrize("counts", [None, {}, {"completion_tokens": None}, {"completion_tokens": "3"}])
def test_without_usage_chunks_are_counted(counts: Any):
    found = answer({**text("a"), "usage": counts}, text("b"), "[DONE]")
    assert (found.output_tokens, found.tokens_from, found.prompt_tokens) == (2, TokenSource.CHUNKS, None)


@pytest.mark.parametrize(
    ("details", "cached"),
    [({"cached_tokens": 3}, 3), ({"cached_tokens": 0}, 0), ({"cached_tokens": "3"}, None), ({}, None), (None, None)],
)
def test_tokens_that_the_endpoint_had_before(details: object, cached: int | None) -> None:
    counts = usage(5, 1)
    counts["usage"]["prompt_tokens_details"] = details
    assert answer(text("a"), counts).cached_tokens == cached


@pytest.mark.parametrize(
    ("first", "is_token"),
    [
        (text(""), True),
        (text("", "length"), False),
        (text("a", "length"), True),
        (chat(role="assistant", content=""), False),
        (chat(content=""), True),
        (chat("stop"), False),
        (chat(reasoning_content="hm"), True),
        ({"choices": []}, False),
    ],
)
def test_what_carries_a_token(first: dict[str, Any], is_token: bool):
    found = answer(first, text("last"))
    assert found.first_s == (1 if is_token else 2)
    assert found.output_tokens == 1 + is_token


@pytest.mark.parametrize(
    ("event", "failure", "says"),
    [
        (Event("message", '{"error": {"message": "no blocks left"}}'), Failure.ERROR_EVENT, "no blocks left"),
        (Event("message", '{"error": "gone"}'), Failure.ERROR_EVENT, "gone"),
        (Event("error", '{"message": "gone"}'), Failure.ERROR_EVENT, "gone"),
        (Event("error", "out of memory"), Failure.ERROR_EVENT, "out of memory"),
        (Event("message", "{"), Failure.MALFORMED, "no JSON object"),
        (Event("message", '{"choices": [1]}'), Failure.MALFORMED, "choices"),
    ],
)
def test_an_event_that_is_no_chunk_ends_the_request(event: Event, failure: Failure, says: str):
    with pytest.raises(RequestFailed, match=says) as raised:
        Answer().add(event, 1.0)
    assert raised.value.failure is failure


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"error": {"message": "m", "code": 1}}, "m"),
        ({"detail": "d"}, "d"),
        ({"detail": [{"msg": "x"}]}, '[{"msg": "x"}]'),
        (None, "null"),
    ],
)
def test_the_message_of_an_error_is_found(document: Any, message: str):
    assert error_message(document) == message
