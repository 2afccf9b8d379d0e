"""The running part of one HTTP request: outputs of all its prompts and choices, in the order they come.

Choice ``i`` of prompt ``p`` is the answer's choice ``p * n + i``, as OpenAI numbers them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from shoal.api.backend import Backend, GatewayObserver
from shoal.errors import InternalError
from shoal.wire.messages import Depth, GenerateRequest, HandoffReport, TokenLogprob, TokenOutput, TtftStages


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an answer may tell of its prompt: the text it is to begin with, if that is asked for, and log-probabilities
    of each token but the first."""

    token_ids: tuple[int, ...]
    echo: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ChoiceOutput:
    """``output`` belongs to the answer's choice ``index``; ``is_last`` of the answer. The first of each choice has its
    ``prompt``."""

    index: int
    output: TokenOutput
    prompt: Prompt | None
    is_last: bool

    @property
    def is_first(self) -> bool:
        return self.prompt is not None

    @property
    def text(self) -> str:
        """What the client is to read, an echoed prompt included."""
        echo = None if self.prompt is None else self.prompt.echo
        return (echo or "") + self.output.text


@dataclass(frozen=True, slots=True)
class PromptTiming:
    """How long a prompt's first token took on the gateway's clock, and what decode says of it."""

    ttft_s: float
    stages: TtftStages | None
    handoff: HandoffReport | None

    @property
    def gateway_s(self) -> float:
        """What is the gateway's of it: validation, tokens, and the way to decode and back."""
        return self.ttft_s - (self.stages.total_s if self.stages is not None else 0.0)


@dataclass(slots=True)
class _ChoiceProgress:
    first_s: float
    last_s: float
    token_ids: list[int] = field(default_factory=list)


class Generation:
    """Runs requests and keeps the counts and times of what came. Times are seconds of ``clock``.

    ``echoes`` are the prompts' texts, one a request, where answers are to begin with them.
    """

    def __init__(
        self,
        backend: Backend,
        requests: Sequence[GenerateRequest],
        *,
        arrived_s: float,
        observer: GatewayObserver,
        clock: Callable[[], float],
        echoes: Sequence[str] = (),
    ) -> None:
        self.requests = tuple(requests)
        texts = echoes or (None,) * len(self.requests)
        self.prompts = [Prompt(one.prompt_token_ids, text) for one, text in zip(self.requests, texts, strict=True)]
        self.timings: dict[int, PromptTiming] = {}
        self._backend = backend
        self._arrived_s = arrived_s
        self._observer = observer
        self._clock = clock
        self._choices: dict[int, _ChoiceProgress] = {}

    @property
    def depth(self) -> Depth:
        """How deep the prompts are encoded, one answer for all; what decode reports wins over what was asked."""
        reports = [timing.handoff for timing in self.timings.values() if timing.handoff is not None]
        return reports[0].depth if reports else self.requests[0].depth

    @property
    def num_choices(self) -> int:
        return sum(request.sampling.num_choices for request in self.requests)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(request.prompt_token_ids) for request in self.requests)

    @property
    def num_cached_tokens(self) -> int:
        """Of the prompts, those whose K/V prefill or decode had already."""
        return sum(timing.handoff.num_cached_tokens for timing in self.timings.values() if timing.handoff is not None)

    @property
    def num_completion_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self._choices.values())

    @property
    def token_ids(self) -> dict[int, list[int]]:
        """What each choice has generated so far."""
        return {index: choice.token_ids for index, choice in sorted(self._choices.items())}

    async def outputs(self) -> AsyncGenerator[ChoiceOutput, None]:
        """Everything until the last choice is complete. Closing it cancels what still runs."""
        num_open = self.num_choices
        async with aclosing(interleave([self._backend.generate(request) for request in self.requests])) as merged:
            async for prompt_index, output in merged:
                index = prompt_index * self.requests[prompt_index].sampling.num_choices + output.choice
                is_first = index not in self._choices
                self._note(prompt_index, index, output)
                if output.finish_reason is not None:
                    num_open -= 1
                prompt = self.prompts[prompt_index] if is_first else None
                yield ChoiceOutput(index, output, prompt, is_last=num_open == 0)
        if num_open:
            raise InternalError(f"{num_open} choices ended without a reason")

    def _note(self, prompt_index: int, index: int, output: TokenOutput) -> None:
        now_s = self._clock()
        if prompt_index not in self.timings:
            ttft_s = now_s - self._arrived_s
            timing = self.timings[prompt_index] = PromptTiming(ttft_s, output.stages, output.handoff)
            if output.prompt_logprobs:
                self.prompts[prompt_index] = replace(self.prompts[prompt_index], logprobs=output.prompt_logprobs)
            if output.stages is not None and output.token_ids:
                self._observer.first_token(ttft_s, timing.gateway_s, output.stages)
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = _ChoiceProgress(now_s, now_s)
        else:
            self._observer.next_token(now_s - choice.last_s)
            choice.last_s = now_s
        choice.token_ids.extend(output.token_ids)
        if output.finish_reason is not None:
            self._observer.last_token(now_s - choice.first_s, len(choice.token_ids))


async def interleave(
    streams: Sequence[AsyncGenerator[TokenOutput, None]],
) -> AsyncGenerator[tuple[int, TokenOutput], None]:
    """Outputs of several streams as they come, each with its stream's index.

    The first error ends them all. Whatever way this ends, every stream is closed.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for output in stream:
                yield 0, output
        return
    ready: asyncio.Queue[tuple[int, TokenOutput | None]] = asyncio.Queue()

    async def pump(index: int, stream: AsyncGenerator[TokenOutput, None]) -> None:
        try:
            async with aclosing(stream):
                async for output in stream:
                    ready.put_nowait((index, output))
        finally:
            ready.put_nowait((index, None))  # its end, or the error that its task holds

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    num_running = len(pumps)
    try:
        while num_running:
            index, item = await ready.get()
            if item is not None:
                yield index, item
            else:
                await pumps[index]
                num_running -= 1
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
