"""Log-probabilities as OpenAI and vLLM write them, and where tokens stand in a text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from shoal.api.generation import Prompt
from shoal.api.tokenizer import Tokenizer
from shoal.engine.detokenizer import TextStream
from shoal.wire.messages import TokenLogprob

Json = dict[str, Any]

# JSON has no infinity; OpenAI writes the log-probability of the impossible like this.
_MIN_LOGPROB = -9999.0


class CompletionLogprobs:
    """``logprobs`` of one choice of /v1/completions, however many parts it comes in."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer.decode)
        self._num_chars = 0

    def of(self, echoed: Prompt | None, tokens: Sequence[TokenLogprob]) -> Json:
        """The next tokens of the choice; the first time those of its prompt before them, if it is echoed.

        ``text_offset`` counts characters. A token that goes on with a character which another began stands where that
        character does.
        """
        told: list[TokenLogprob] = [*tokens]
        first: list[str] = []  # of an echoed prompt: nothing comes before it, so it has a text and nothing else
        offsets: list[int] = []
        if echoed is not None:
            told[:0] = echoed.logprobs
            first = [self._tokenizer.decode(echoed.token_ids[:1])]
            offsets = self._place_prompt(echoed)
        offsets += (self._place(one.token_id) for one in tokens)
        return {
            "tokens": first + [one.token for one in told],
            "token_logprobs": [None] * len(first) + [_finite(one.logprob) for one in told],
            "top_logprobs": [None] * len(first) + [_by_token(one) for one in told],
            "text_offset": offsets,
        }

    def _place_prompt(self, prompt: Prompt) -> list[int]:
        """Where its tokens stand; the answer goes on where its text ends, with characters of its own."""
        text, offsets = prompt.echo or "", []
        for token_id in prompt.token_ids:
            offsets.append(min(self._place(token_id), len(text)))
            # One that the client wrote out is part of the text; one that the tokenizer put there isn't.
            special = self._tokenizer.special_text(token_id)
            if special and text.startswith(special, self._num_chars):
                self._num_chars += len(special)
        self._stream = TextStream(self._tokenizer.decode)
        self._num_chars = len(text)
        return offsets

    def _place(self, token_id: int) -> int:
        offset = self._num_chars
        self._num_chars += len(self._stream.add(token_id))
        return offset


def chat_logprobs(tokens: Iterable[TokenLogprob]) -> Json | None:
    """``logprobs`` of a choice of /v1/chat/completions."""
    content = [
        {**_token(one.token, one.logprob), "top_logprobs": [_token(token, logprob) for _, token, logprob in one.top]}
        for one in tokens
    ]
    return {"content": content} if content else None


def prompt_logprobs(prompt: Prompt) -> list[Json | None]:
    """vLLM's field of that name: by token id, the alternatives and the token itself; nothing for the first token.

    ``rank`` is ``null`` for a token that isn't among the alternatives.
    """
    return [None, *(_by_id(one) for one in prompt.logprobs)]


def _by_id(one: TokenLogprob) -> Json:
    own = (one.token_id, one.token, one.logprob)
    ranks = {other: rank for rank, other in enumerate(one.top, start=1)}
    return {
        str(token_id): {"logprob": _finite(logprob), "rank": ranks.get(other), "decoded_token": token}
        for other in dict.fromkeys((*one.top, own))
        for token_id, token, logprob in [other]
    }


def _by_token(one: TokenLogprob) -> dict[str, float]:
    """The alternatives and the token itself, best first; of those that read alike, the best."""
    entries = [(token, logprob) for _, token, logprob in one.top] + [(one.token, one.logprob)]
    best: dict[str, float] = {}
    for token, logprob in sorted(entries, key=lambda entry: -entry[1]):
        best.setdefault(token, _finite(logprob))
    return best


def _token(token: str, logprob: float) -> Json:
    # A token that is only part of a character has no text, and its bytes aren't known here.
    whole = "\N{REPLACEMENT CHARACTER}" not in token
    return {"token": token, "logprob": _finite(logprob), "bytes": list(token.encode()) if whole else None}


def _finite(logprob: float) -> float:
    return max(logprob, _MIN_LOGPROB)
