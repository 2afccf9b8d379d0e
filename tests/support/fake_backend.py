"""A decode pool that says what a test tells it to: no model, but real token ids, text and stop strings."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace

from shoal.api.backend import Readiness
from shoal.engine.detokenizer import Detokenizer
from shoal.wire.messages import (
    Depth,
    FinishReason,
    GenerateRequest,
    HandoffReport,
    TokenLogprob,
    TokenOutput,
    TtftStages,
)

STAGES = TtftStages(reserve_s=0.001, queue_s=0.002, prefill_s=0.003, transfer_exposed_s=0.004, boundary_step_s=0.005)


@dataclass
class FakeBackend:
    """Every choice continues with ``text``, or what ``text_of`` says, one token an output, the choices taking turns.

    With ``hold_after`` outputs it waits until ``release`` is called from any thread; with ``fail_after`` it raises
    ``error``. ``ended`` is released once for each request that let go of all it had.
    """

    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    text: str = "The pools hand the prompt over."
    text_of: Callable[[GenerateRequest, int], str] | None = None
    readiness_now: Readiness = field(default_factory=lambda: Readiness(num_decode=1, num_prefill=1))
    hold_after: int | None = None
    fail_after: int | None = None
    error: Exception | None = None
    requests: list[GenerateRequest] = field(default_factory=list)
    num_outputs: int = 0
    num_running: int = 0
    held: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    ended: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _gates: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = field(default_factory=list)

    async def readiness(self) -> Readiness:
        return self.readiness_now

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        self.requests.append(request)
        self.num_running += 1
        try:
            for count, output in enumerate(self.outputs(request)):
                await self._interrupt(count)
                self.num_outputs += 1
                yield output
        finally:
            self.num_running -= 1
            self.ended.release()

    def outputs(self, request: GenerateRequest) -> list[TokenOutput]:
        """What ``request`` gets if nothing interrupts it."""
        choices = [self._choice(request, index) for index in range(request.sampling.num_choices)]
        steps = max(map(len, choices))
        first, *others = [choice[step] for step in range(steps) for choice in choices if step < len(choice)]
        report = HandoffReport(request.depth, transferred=request.depth is Depth.SHALLOW)
        told = self._prompt_logprobs(request)
        return [replace(first, stages=STAGES, handoff=report, prompt_logprobs=told), *others]

    def release(self) -> None:
        """Let all held requests go on."""
        for loop, gate in self._gates:
            loop.call_soon_threadsafe(gate.set)

    async def _interrupt(self, count: int) -> None:
        if count == self.hold_after:
            gate = asyncio.Event()
            self._gates.append((asyncio.get_running_loop(), gate))
            self.held.release()
            await gate.wait()
        if count == self.fail_after and self.error is not None:
            raise self.error

    def _choice(self, request: GenerateRequest, choice: int) -> list[TokenOutput]:
        sampling = request.sampling
        if not sampling.max_tokens:
            return [TokenOutput(choice, (), "", finish_reason=FinishReason.LENGTH)]
        ids = list(self.encode(self.text if self.text_of is None else self.text_of(request, choice)))
        ids = (ids * (sampling.max_tokens // len(ids) + 1))[: sampling.max_tokens] if sampling.ignore_eos else ids
        detokenizer = Detokenizer(self.decode, stop=sampling.stop, min_tokens=sampling.min_tokens)
        outputs = []
        for index, token_id in enumerate(ids[: sampling.max_tokens]):
            text = detokenizer.add(token_id)
            is_last = index + 1 == min(len(ids), sampling.max_tokens)
            text += detokenizer.flush() if is_last and detokenizer.stop_reason is None else ""
            stopped = detokenizer.stop_reason
            ended = FinishReason.LENGTH if index + 1 == sampling.max_tokens else FinishReason.STOP
            outputs.append(
                TokenOutput(
                    choice=choice,
                    token_ids=(token_id,),
                    text=text,
                    logprobs=self._logprobs(token_id, sampling.num_logprobs),
                    finish_reason=FinishReason.STOP if stopped is not None else ended if is_last else None,
                    stop_reason=stopped,
                )
            )
            if stopped is not None:
                break
        return outputs

    def _prompt_logprobs(self, request: GenerateRequest) -> tuple[TokenLogprob, ...]:
        num = request.sampling.num_prompt_logprobs
        return tuple(one for token_id in request.prompt_token_ids[1:] for one in self._logprobs(token_id, num))

    def _logprobs(self, token_id: int, num: int | None) -> tuple[TokenLogprob, ...]:
        if num is None:
            return ()
        top = tuple((token_id + rank, self.decode([token_id + rank]), -0.5 - rank) for rank in range(num))
        return (TokenLogprob(token_id, self.decode([token_id]), -0.5, top),)
