"""One request's tokens on their way out: text, stop strings, and where each choice stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shoal.engine.detokenizer import Detokenizer
from shoal.engine.engine import TokenEvent
from shoal.messages import FinishReason, GenerateRequest, TokenLogprob, TokenOutput


class ChoiceStreams:
    """Turns the engine's token events into outputs. ``decode`` is ids -> text without special tokens."""

    def __init__(self, request: GenerateRequest, decode: Callable[[Sequence[int]], str]) -> None:
        self._request = request
        self._decode = decode
        self._open = {choice: self._detokenizer() for choice in range(request.sampling.num_choices)}

    @property
    def is_open(self) -> bool:
        """Some choice still runs."""
        return bool(self._open)

    def accept(self, event: TokenEvent) -> TokenOutput | None:
        """The output of one token; ``None`` for a choice that a stop string has ended already.

        An output that ends its choice without the engine's doing (a stop string) has ``stop_reason`` text: the
        caller must then end the choice in the engine.
        """
        detokenizer = self._open.get(event.choice)
        if detokenizer is None:
            return None
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
        return TokenOutput(
            choice=event.choice,
            token_ids=(event.token_id,),
            text=text,
            logprobs=self._logprobs(event),
            finish_reason=reason,
            stop_reason=stopped if stopped is not None else stop,
        )

    def _detokenizer(self) -> Detokenizer:
        sampling = self._request.sampling
        return Detokenizer(self._decode, stop=sampling.stop, min_tokens=sampling.min_tokens)

    def _logprobs(self, event: TokenEvent) -> tuple[TokenLogprob, ...]:
        if event.logprob is None:
            return ()
        top = tuple((token_id, self._decode([token_id]), logprob) for token_id, logprob in event.top)
        return (TokenLogprob(event.token_id, self._decode([event.token_id]), event.logprob, top),)
