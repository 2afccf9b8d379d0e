"""An answer as it streams in: which of OpenAI's chunks carry tokens, when these came, and what usage counts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from shoal_lab.bench.record import Failure, TokenSource
from shoal_lab.bench.sse import Event

MAX_DETAIL_CHARS = 200


class RequestFailed(Exception):
    """Ends one request, and becomes the failure of its record."""

    def __init__(self, failure: Failure, detail: str) -> None:
        super().__init__(detail)
        self.failure, self.detail = failure, encodable(detail[:MAX_DETAIL_CHARS])


@dataclass(slots=True)
class Answer:
    """``first_s`` and ``last_s`` are when the first and the last chunk with tokens came, by the clock of ``add``."""

    status: int | None = None
    first_s: float | None = None
    last_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    is_done: bool = False
    _num_chunks: int = 0
    _usage: dict[str, Any] = field(default_factory=dict)

    @property
    def output_tokens(self) -> int:
        return self._count("completion_tokens") or self._num_chunks

    @property
    def prompt_tokens(self) -> int | None:
        return self._count("prompt_tokens")

    @property
    def cached_tokens(self) -> int | None:
        details = self._usage.get("prompt_tokens_details")
        count = details.get("cached_tokens") if isinstance(details, dict) else None
        return count if isinstance(count, int) else None

    @property
    def tokens_from(self) -> TokenSource:
        return TokenSource.USAGE if self._count("completion_tokens") else TokenSource.CHUNKS

    def add(self, event: Event, now_s: float) -> None:
        """Raises RequestFailed if the event is an error, or none of OpenAI's."""
        if event.data.strip() == "[DONE]":
            self.is_done = True
            return
        document = _document(event)
        if event.name == "error" or document.get("error"):
            raise RequestFailed(Failure.ERROR_EVENT, error_message(document))
        if isinstance(document.get("usage"), dict):
            self._usage = document["usage"]
        choices = document.get("choices", [])
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise RequestFailed(Failure.MALFORMED, f"choices are no list of objects: {event.data}")
        if any(map(_carries_token, choices)):
            self._token(now_s)

    def _token(self, now_s: float) -> None:
        if self.last_s is None:
            self.first_s = now_s
        else:
            self.gaps_s.append(now_s - self.last_s)
        self.last_s = now_s
        self._num_chunks += 1

    def _count(self, name: str) -> int | None:
        count = self._usage.get(name)
        return count if isinstance(count, int) else None


def encodable(text: str) -> str:
    """As a file in UTF-8 can hold it. JSON may have half of a surrogate pair in a string, and Python keeps it."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def error_message(document: Any) -> str:
    """What an endpoint's error says, wherever it says it."""
    if isinstance(document, dict):
        for name in ("error", "message", "detail"):
            if document.get(name):
                return error_message(document[name])
    return document if isinstance(document, str) else json.dumps(document)


def _document(event: Event) -> dict[str, Any]:
    try:
        document = json.loads(event.data)
    except (ValueError, RecursionError):
        document = None
    if event.name == "error" and not isinstance(document, dict):
        return {"error": event.data}
    if not isinstance(document, dict):
        raise RequestFailed(Failure.MALFORMED, f"an event that is no JSON object: {event.data}")
    return document


def _carries_token(choice: dict[str, Any]) -> bool:
    """Text does. No text does too, unless the chunk only opens a chat or ends the answer: a token may have no text,
    such as a special one or half a character, and endpoints send it when they have it.
    """
    delta = choice.get("delta")
    if isinstance(delta, dict):
        spoken = any(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls"))
        return spoken or ("role" not in delta and choice.get("finish_reason") is None)
    return bool(choice.get("text")) or ("text" in choice and choice.get("finish_reason") is None)
