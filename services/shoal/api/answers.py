"""The JSON of OpenAI's answers: whole bodies and the events of a stream."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from shoal.api.generation import ChoiceOutput, Generation, Prompt
from shoal.api.logprobs import CompletionLogprobs, Json, chat_logprobs, prompt_logprobs
from shoal.api.refusals import error_document
from shoal.api.schema import Body, ChatBody, CompletionBody, StreamOptions
from shoal.api.tokenizer import Tokenizer
from shoal.errors import ShoalError
from shoal.wire.messages import FinishReason, TokenLogprob


@dataclass(slots=True)
class Choice:
    """One choice as far as it has come."""

    index: int
    text: str = ""
    prompt: Prompt | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def add(self, one: ChoiceOutput) -> None:
        output = one.output
        self.text += one.text
        self.prompt = one.prompt or self.prompt
        self.logprobs += output.logprobs
        self.finish_reason = output.finish_reason
        self.stop_reason = output.stop_reason


async def whole_choices(generation: Generation) -> list[Choice]:
    """All choices of ``generation``, complete, by index."""
    choices = [Choice(index) for index in range(generation.num_choices)]
    async with aclosing(generation.outputs()) as outputs:
        async for one in outputs:
            choices[one.index].add(one)
    return choices


class AnswerFormat(Protocol):
    """How one endpoint writes the choices of one answer."""

    id_prefix: ClassVar[str]
    body_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def whole(self, choices: Sequence[Choice]) -> Json:
        """Complete choices, and what else of the answer depends on the endpoint."""
        ...

    def delta(self, one: ChoiceOutput) -> Json:
        """What one output adds to its choice. Outputs come in their order."""
        ...


class CompletionFormat:
    """/v1/completions"""

    id_prefix: ClassVar[str] = "cmpl-"
    body_object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"

    def __init__(self, body: CompletionBody, tokenizer: Tokenizer) -> None:
        self._body = body
        self._logprobs_of = defaultdict[int, CompletionLogprobs](lambda: CompletionLogprobs(tokenizer))
        self._told: tuple[Prompt, list[Json | None]] | None = None

    def whole(self, choices: Sequence[Choice]) -> Json:
        return {"choices": [self._whole_choice(choice) for choice in choices]}

    def _whole_choice(self, choice: Choice) -> Json:
        extra = {}
        if self._body.prompt_logprobs is not None and choice.prompt is not None:
            # Choices of one prompt follow one another, and tell the same of it.
            if self._told is None or self._told[0] is not choice.prompt:
                self._told = (choice.prompt, prompt_logprobs(choice.prompt))
            extra = {"prompt_logprobs": self._told[1]}
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": self._logprobs(choice.index, choice.prompt, choice.logprobs),
            **extra,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def delta(self, one: ChoiceOutput) -> Json:
        return {
            "index": one.index,
            "text": one.text,
            "logprobs": self._logprobs(one.index, one.prompt, one.output.logprobs),
            "finish_reason": one.output.finish_reason,
            "stop_reason": one.output.stop_reason,
        }

    def _logprobs(self, index: int, prompt: Prompt | None, tokens: Sequence[TokenLogprob]) -> Json | None:
        echoed = prompt if prompt is not None and prompt.echo is not None else None
        if self._body.logprobs is None or (echoed is None and not tokens):
            return None
        return self._logprobs_of[index].of(echoed, tokens)


class ChatFormat:
    """/v1/chat/completions"""

    id_prefix: ClassVar[str] = "chatcmpl-"
    body_object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"

    def __init__(self, body: ChatBody, _tokenizer: Tokenizer) -> None:
        self._body = body

    def whole(self, choices: Sequence[Choice]) -> Json:
        document: Json = {"choices": [self._whole_choice(choice) for choice in choices]}
        prompt = choices[0].prompt
        if self._body.prompt_logprobs is not None and prompt is not None:
            document["prompt_logprobs"] = prompt_logprobs(prompt)
        return document

    def _whole_choice(self, choice: Choice) -> Json:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text},
            "logprobs": chat_logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def delta(self, one: ChoiceOutput) -> Json:
        # The role comes with the first token: clients take the first chunk for the first token's time.
        role = {"role": "assistant"} if one.is_first else {}
        return {
            "index": one.index,
            "delta": {**role, "content": one.text},
            "logprobs": chat_logprobs(one.output.logprobs),
            "finish_reason": one.output.finish_reason,
            "stop_reason": one.output.stop_reason,
        }


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
        document = self._document(self._format.body_object, self._format.whole(choices))
        document["usage"] = usage(self._generation)
        return self._with_timing(document)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, the end marker excepted. The first one comes with the first output."""
        options = self.body.stream_options or StreamOptions()
        async with aclosing(self._generation.outputs()) as outputs:
            async for one in outputs:
                if not (_is_worth_an_event(one) or options.continuous_usage_stats):
                    continue
                chunk = self._document(self._format.chunk_object, {"choices": [self._format.delta(one)]})
                if options.continuous_usage_stats:
                    chunk["usage"] = usage(self._generation)
                elif options.include_usage:
                    chunk["usage"] = None
                if one.is_last and not options.include_usage:
                    chunk = self._with_timing(chunk)
                yield _event(chunk)
        if options.include_usage:
            chunk = self._document(self._format.chunk_object, {"choices": []})
            chunk["usage"] = usage(self._generation)
            yield _event(self._with_timing(chunk))

    def _document(self, kind: str, content: Json) -> Json:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created_s,
            "model": self.body.model,
            **content,
        }

    def _with_timing(self, document: Json) -> Json:
        return {**document, "shoal": timing(self._generation)} if self._wants_timing else document


def error_event(error: ShoalError) -> bytes:
    """The last event of a stream that failed."""
    return _event(error_document(error))


def stream_end() -> bytes:
    """The last event of a stream that is complete."""
    return b"data: [DONE]\n\n"


# json.dumps makes one for each document that isn't written as it is by default.
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
# Ends of lines to Unicode, and to clients that read events line by line as httpx does; none to JSON.
_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


def _event(document: Json) -> bytes:
    text = _ENCODER.encode(document)
    return b"data: " + (text if text.isascii() else text.translate(_LINE_ENDS)).encode() + b"\n\n"


def _is_worth_an_event(one: ChoiceOutput) -> bool:
    output = one.output
    return one.is_first or bool(output.text) or bool(output.logprobs) or output.finish_reason is not None


def usage(generation: Generation) -> Json:
    """Token counts so far. ``depth`` is how deep the prompts are encoded."""
    num_prompt, num_completion = generation.num_prompt_tokens, generation.num_completion_tokens
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": generation.num_cached_tokens},
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
