"""How fast answers come, as of late and at best: their first token, and each further one; and how many those are."""

from __future__ import annotations

from collections import deque

_NEWEST = 0.3
"""The weight of the last measurement."""
_WHOLE = 16
"""So many tokens make a whole measurement; fewer count for less, and never as the best."""
_FORGETS = 1.001
"""By how much the best gets worse with each measurement: what it was may never come again."""
_NUM_LENGTHS = 100
_MOST = 0.75


class Tempo:
    """Times are seconds. Of what wasn't seen yet, everything takes no time."""

    def __init__(self) -> None:
        self._first_s: float | None = None
        self._token_s: float | None = None
        self._best_prompt_token_s: float | None = None
        self._best_token_s: float | None = None
        self._lengths: deque[float] = deque(maxlen=_NUM_LENGTHS)
        self.usual_tokens: float | None = None
        """As long, or shorter, are the answers that three quarters of all tokens belong to: the long ones are few, and
        most of the work."""

    def began(self, first_s: float, num_prompt_tokens: int) -> None:
        """The first token came after ``first_s``."""
        self._first_s = _nearer(self._first_s, first_s, _NEWEST)
        self._best_prompt_token_s = _best(self._best_prompt_token_s, first_s / num_prompt_tokens)

    def waited(self, seconds: float) -> None:
        """In that time not even the first token came."""
        if self._first_s is None or seconds > self._first_s:
            self._first_s = _nearer(self._first_s, seconds, _NEWEST)

    def went_on(self, seconds: float, num_tokens: float) -> None:
        """So many tokens came in ``seconds``, after the first one."""
        token_s = seconds / num_tokens
        self._token_s = _nearer(self._token_s, token_s, _NEWEST * min(1.0, num_tokens / _WHOLE))
        if num_tokens >= _WHOLE:
            self._best_token_s = _best(self._best_token_s, token_s)

    def ended(self, num_tokens: float) -> None:
        """An answer was that long."""
        self._lengths.append(num_tokens)
        left = sum(self._lengths) * _MOST
        for length in sorted(self._lengths):
            left -= length
            if left <= 0:
                self.usual_tokens = length
                return

    def now_s(self, num_tokens: float) -> float:
        """How long an answer takes, as things are."""
        return (self._first_s or 0.0) + self.further_s(num_tokens)

    def further_s(self, num_tokens: float) -> float:
        """The same, once its first token is there."""
        return num_tokens * (self._token_s or 0.0)

    def alone_s(self, num_prompt_tokens: int, num_tokens: float) -> float:
        """How long it would take if nothing else were here."""
        return num_prompt_tokens * (self._best_prompt_token_s or 0.0) + num_tokens * (self._best_token_s or 0.0)

    @property
    def knows_best(self) -> bool:
        return self._best_prompt_token_s is not None and self._best_token_s is not None


def _nearer(before: float | None, value: float, weight: float) -> float:
    return value if before is None else before + weight * (value - before)


def _best(before: float | None, value: float) -> float:
    return value if before is None else min(before * _FORGETS, value)
