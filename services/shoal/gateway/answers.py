"""The JSON of OpenAI's answers: whole bodies and the events of a stream."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from shoal.errors import ShoalError
from shoal.gateway.generation import ChoiceOutput, Generation
from shoal.gateway.refusals import error_document
from shoal.gateway.schema import Body, StreamOptions
from shoal.messages import FinishReason, TokenLogprob, TokenOutput

Json = dict[str, Any]

# JSON has no infinity; OpenAI writes the log-probability of the impossible like this.
_MIN_LOGPROB = -9999.0


@dataclass(slots=True)
class Choice:
    """One choice as far as it has come."""

    index: int
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def add(self, output: TokenOutput) -> None:
        self.text += output.text
        self.logprobs += output.logprobs
        self.finish_reason = output.finish_reason
        self.stop_reason = output.stop_reason


async def whole_choices(generation: Generation) -> list[Choice]:
    """All choices of ``generation``, complete, by index."""
    choices = [Choice(index) for index in range(generation.num_choices)]
    async with aclosing(generation.outputs(is_whole=True)) as outputs:
        async for one in outputs:
            choices[one.index].add(one.output)
    return choices


class AnswerFormat(Protocol):
    """How one endpoint writes choices."""

    id_prefix: ClassVar[str]
    body_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def whole(self, choice: Choice) -> Json:
        """A complete choice."""
        ...

    def delta(self, index: int, output: TokenOutput, *, is_first: bool, offset: int) -> Json:
        """What one output adds to a choice. ``offset`` is where its tokens begin in the choice's text (characters)."""
        ...


class CompletionFormat:
    """/v1/completions"""

    id_prefix: ClassVar[str] = "cmpl-"
    body_object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"

    def whole(self, choice: Choice) -> Json:
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": self._logprobs(choice.logprobs, 0),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def delta(self, index: int, output: TokenOutput, *, is_first: bool, offset: int) -> Json:
        return {
            "index": index,
            "text": output.text,
            "logprobs": self._logprobs(output.logprobs, offset),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }

    def _logprobs(self, tokens: Iterable[TokenLogprob], offset: int) -> Json | None:
        tokens = list(tokens)
        if not tokens:
            return None
        offsets = []
        for one in tokens:
            offsets.append(offset)
            offset += len(one.token)
        return {
            "tokens": [one.token for one in tokens],
            "token_logprobs": [_finite(one.logprob) for one in tokens],
            "top_logprobs": [_by_token(one) for one in tokens],
            "text_offset": offsets,
        }


class ChatFormat:
    """/v1/chat/completions"""

    id_prefix: ClassVar[str] = "chatcmpl-"
    body_object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"

    def whole(self, choice: Choice) -> Json:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text},
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def delta(self, index: int, output: TokenOutput, *, is_first: bool, offset: int) -> Json:
        # The role comes with the first token: clients take the first chunk for the first token's time.
        role = {"role": "assistant"} if is_first else {}
        return {
            "index": index,
            "delta": {**role, "content": output.text},
            "logprobs": self._logprobs(output.logprobs),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }

    def _logprobs(self, tokens: Iterable[TokenLogprob]) -> Json | None:
        content = [
            {
                **_token(one.token, one.logprob),
                "top_logprobs": [_token(token, logprob) for _, token, logprob in one.top],
            }
            for one in tokens
        ]
        return {"content": content} if content else None


class Answer:
    """What one request gets: ``whole`` at once, or ``events`` as it comes. Use one of the two, once."""

    def __init__(
        self, answer_format: AnswerFormat, body: Body, generation: Generation, request_id: str, *, wants_timing: bool
    ) -> None:
        self.body = body
        self._format = answer_format
        self._generation = generation
        self._id = answer_format.id_prefix + request_id
        self._created_s = int(time.time())
        self._wants_timing = wants_timing

    async def whole(self) -> Json:
        """The body of an answer that isn't streamed."""
        choices = await whole_choices(self._generation)
        document = self._document(self._format.body_object, [self._format.whole(choice) for choice in choices])
        document["usage"] = usage(self._generation)
        return self._with_timing(document)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, the end marker excepted. The first one comes with the first output."""
        options = self.body.stream_options or StreamOptions()
        offsets: Counter[int] = Counter()
        async with aclosing(self._generation.outputs()) as outputs:
            async for one in outputs:
                if not (_is_worth_an_event(one) or options.continuous_usage_stats):
                    continue
                delta = self._format.delta(one.index, one.output, is_first=one.is_first, offset=offsets[one.index])
                offsets[one.index] += sum(len(token.token) for token in one.output.logprobs)
                chunk = self._document(self._format.chunk_object, [delta])
                if options.continuous_usage_stats:
                    chunk["usage"] = usage(self._generation)
                elif options.include_usage:
                    chunk["usage"] = None
                if one.is_last and not options.include_usage:
                    chunk = self._with_timing(chunk)
                yield _event(chunk)
        if options.include_usage:
            chunk = self._document(self._format.chunk_object, [])
            chunk["usage"] = usage(self._generation)
            yield _event(self._with_timing(chunk))

    def _document(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created_s,
            "model": self.body.model,
            "choices": choices,
        }

    def _with_timing(self, document: Json) -> Json:
        return {**document, "shoal": timing(self._generation)} if self._wants_timing else document


def error_event(error: ShoalError) -> bytes:
    """The last event of a stream that failed."""
    return _event(error_document(error))


def stream_end() -> bytes:
    """The last event of a stream that is complete."""
    return b"data: [DONE]\n\n"


def _event(document: Json) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _is_worth_an_event(one: ChoiceOutput) -> bool:
    output = one.output
    return one.is_first or bool(output.text) or bool(output.logprobs) or output.finish_reason is not None


def usage(generation: Generation) -> Json:
    """Token counts so far. ``depth`` is how deep the prompts are encoded; nothing is cached between requests."""
    num_prompt, num_completion = generation.num_prompt_tokens, generation.num_completion_tokens
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": 0},
        "depth": generation.depth,
    }


def timing(generation: Generation) -> Json:
    """What a request that sends ``x-shoal-timing: 1`` gets beside its answer. Times are milliseconds.

    ``prompts[i]`` has ``ttft_ms`` on the gateway's clock, of which ``stages_ms`` are the parts;
    ``choices[i].token_ids`` is what was generated, the end token included.
    """
    prompts = []
    for index, one in sorted(generation.timings.items()):
        stages = {} if one.stages is None else {"gateway_s": one.gateway_s, **dataclasses.asdict(one.stages)}
        prompts.append(
            {
                "index": index,
                "ttft_ms": one.ttft_s * 1e3,
                "stages_ms": {name.removesuffix("_s"): seconds * 1e3 for name, seconds in stages.items()},
                "handoff": None if one.handoff is None else dataclasses.asdict(one.handoff),
            }
        )
    choices = [{"index": index, "token_ids": ids} for index, ids in generation.token_ids.items()]
    return {"prompts": prompts, "choices": choices}


def _finite(logprob: float) -> float:
    return max(logprob, _MIN_LOGPROB)


def _token(token: str, logprob: float) -> Json:
    # A token that is only part of a character has no text, and its bytes aren't known here.
    whole = "\N{REPLACEMENT CHARACTER}" not in token
    return {"token": token, "logprob": _finite(logprob), "bytes": list(token.encode()) if whole else None}


def _by_token(one: TokenLogprob) -> dict[str, float]:
    """The alternatives and the token itself, best first; of those that read alike, the best."""
    entries = [(token, logprob) for _, token, logprob in one.top] + [(one.token, one.logprob)]
    best: dict[str, float] = {}
    for token, logprob in sorted(entries, key=lambda entry: -entry[1]):
        best.setdefault(token, _finite(logprob))
    return best
