"""How many tokens of prompts a step may run, so that nobody waits for it longer than was said."""

from __future__ import annotations

_LEAST_TOKENS = 128
"""A step of fewer costs nearly as much: the weights are read all the same."""
_GRAIN_TOKENS = 64
_NEWEST = 0.3
"""The weight of the last step, so that one that was disturbed doesn't count for much."""


class Pace:
    """From what steps took. Until one was seen, and at most, ``max_tokens``."""

    def __init__(self, target_s: float, max_tokens: int) -> None:
        self._target_s = target_s
        self._max_tokens = max_tokens
        self._token_s: float | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that take about ``target_s``."""
        if self._token_s is None or (fitting := self._target_s / self._token_s) >= self._max_tokens:
            return self._max_tokens
        return min(max(int(fitting) // _GRAIN_TOKENS * _GRAIN_TOKENS, _LEAST_TOKENS), self._max_tokens)

    def saw(self, num_tokens: int, seconds: float) -> None:
        """A step took ``seconds``. Small ones say nothing: most of their time isn't their tokens'."""
        if num_tokens < _LEAST_TOKENS or seconds <= 0:
            return
        token_s = seconds / num_tokens
        self._token_s = token_s if self._token_s is None else _NEWEST * token_s + (1 - _NEWEST) * self._token_s

    def forget(self) -> None:
        """As at the start: what was seen was no step as others are."""
        self._token_s = None
