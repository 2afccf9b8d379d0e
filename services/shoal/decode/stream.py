"""One request's answer on its way out: text, stop strings, log-probabilities, and where each choice stands."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial

from shoal.engine.detokenizer import Detokenizer
from shoal.engine.events import PromptEvent, TokenEvent
from shoal.wire.messages import FinishReason, GenerateRequest, SentChoice, TokenLogprob, TokenOutput


class ChoiceStreams:
    """Turns the engine's events into outputs. ``decode`` is ids -> text without special tokens.

    Of a resumed answer, text that was held back with the last token sent comes out with the next: what a choice's
    tokens make final, and when, depends on them alone.
    """

    def __init__(self, request: GenerateRequest, decode: Callable[[Sequence[int]], str]) -> None:
        self._request = request
        self._decode = decode
        self._token_text = cache(partial(_text_of, decode))
        self._open = {
            index: self._detokenizer(sent) for index, sent in enumerate(_sent(request)) if not sent.is_complete
        }
        self._prompt_logprobs: list[TokenLogprob] = []

    @property
    def num_open(self) -> int:
        """Choices that still run."""
        return len(self._open)

    def accept(self, event: TokenEvent | PromptEvent) -> list[TokenOutput]:
        """What ``event`` brought: usually one output, none for a choice that a stop string has ended already.

        What is told of the prompt waits for the first output. An output that ends its choice without the engine's doing
        (a stop string) has ``stop_reason`` text: the caller must then end the choice in the engine.
        """
        outputs = self._accept_prompt(event) if isinstance(event, PromptEvent) else self._accept_token(event)
        if outputs and self._prompt_logprobs:
            outputs[0] = replace(outputs[0], prompt_logprobs=tuple(self._prompt_logprobs))
            self._prompt_logprobs.clear()
        return outputs

    def _accept_prompt(self, event: PromptEvent) -> list[TokenOutput]:
        self._prompt_logprobs += (self._logprob(one.token_id, one.logprob, one.top) for one in event.scores)
        if event.finish_reason is None:
            return []
        ended = [TokenOutput(choice, (), "", finish_reason=event.finish_reason) for choice in self._open]
        self._open.clear()
        return ended

    def _accept_token(self, event: TokenEvent) -> list[TokenOutput]:
        detokenizer = self._open.get(event.choice)
        if detokenizer is None:
            return []
        ends_silently = event.finish_reason is FinishReason.STOP
        text = "" if ends_silently else detokenizer.add(event.token_id)
        reason, stop = event.finish_reason, event.stop_reason
        stopped: str | None = detokenizer.stop_reason
        if stopped is not None:
            reason = FinishReason.STOP
        elif reason is not None:
            text += detokenizer.flush()
            stopped = detokenizer.stop_reason
            reason = FinishReason.STOP if stopped is not None else reason
        if reason is not None:
            del self._open[event.choice]
        logprob = event.logprob
        output = TokenOutput(
            choice=event.choice,
            token_ids=(event.token_id,),
            text=text,
            logprobs=() if logprob is None else (self._logprob(event.token_id, logprob, event.top),),
            finish_reason=reason,
            stop_reason=stopped if stopped is not None else stop,
        )
        return [output]

    def _detokenizer(self, sent: SentChoice) -> Detokenizer:
        sampling = self._request.sampling
        detokenizer = Detokenizer(self._decode, stop=sampling.stop, min_tokens=sampling.min_tokens)
        for token_id in sent.token_ids:
            detokenizer.add(token_id)
        return detokenizer

    def _logprob(self, token_id: int, logprob: float, top: tuple[tuple[int, float], ...]) -> TokenLogprob:
        texts = tuple((other, self._token_text(other), its_logprob) for other, its_logprob in top)
        return TokenLogprob(token_id, self._token_text(token_id), logprob, texts)


def _text_of(decode: Callable[[Sequence[int]], str], token_id: int) -> str:
    """As it reads after another token: before a text's first one, a tokenizer may drop a space."""
    return decode([token_id, token_id]).removeprefix(decode([token_id]))


def joined(outputs: Sequence[TokenOutput]) -> Iterable[TokenOutput]:
    """One a choice, with all that its own bring."""
    if len(outputs) == 1:
        return outputs
    by_choice = defaultdict[int, list[TokenOutput]](list)
    for output in outputs:
        by_choice[output.choice].append(output)
    return [_join(ones) if len(ones) > 1 else ones[0] for ones in by_choice.values()]


def _join(outputs: Sequence[TokenOutput]) -> TokenOutput:
    """Of one choice, in their order: the first may tell how it began, the last how it ends."""
    last = outputs[-1]
    return replace(
        outputs[0],
        token_ids=tuple(token_id for one in outputs for token_id in one.token_ids),
        text="".join(one.text for one in outputs),
        logprobs=tuple(logprob for one in outputs for logprob in one.logprobs),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )


def _sent(request: GenerateRequest) -> tuple[SentChoice, ...]:
    """What was given out of each choice before."""
    if request.resumption is None:
        return (SentChoice(),) * request.sampling.num_choices
    return request.resumption.choices
