"""Token ids to printable text, one token at a time, for one choice.

Two things hold text back. A token may end in the middle of a character: what it brings waits for the rest. And text
that may be the beginning of a stop string waits until it's clear that it isn't::

    ids ──> characters ──> stop strings ──> text that is final
            (TextStream)   (StopStrings)

Plain Python over a function from ids to text: needs no model and no device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

Decode = Callable[[Sequence[int]], str]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, and a token at least one.
_MAX_CHARACTER_TOKENS = 4


class _Backend(Protocol):
    """The part of tokenizers' Tokenizer that is needed here."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


def decode_with(backend: _Backend) -> Decode:
    """Ids to text without special tokens, and without a clean-up that would change text already sent."""

    def decode(ids: Sequence[int]) -> str:
        return backend.decode(list(ids), skip_special_tokens=True)

    return decode


class Detokenizer:
    """Text of one choice as it becomes final.

    The pieces that ``add`` and ``flush`` return, joined, are ``decode`` of all ids, cut before the first stop string.
    The first is the one that completes first; of two that complete together, the longer. A stop string counts only
    if it completes in text of a token after the first ``min_tokens``. ``stop_reason`` is the one found, or ``None``.
    """

    def __init__(self, decode: Decode, *, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._stream = TextStream(decode)
        self._stops = StopStrings(stop)
        self._min_tokens = min_tokens
        self._num_tokens = 0

    @property
    def stop_reason(self) -> str | None:
        return self._stops.found

    def add(self, token_id: int) -> str:
        """Text that became final with this token; nothing once a stop string was found."""
        if self._stops.found is not None:
            return ""
        self._num_tokens += 1
        return self._stops.add(self._stream.add(token_id), counts=self._num_tokens > self._min_tokens)

    def flush(self) -> str:
        """The text that was held back: call it once, after the last token. It may still complete a stop string."""
        if self._stops.found is not None:
            return ""
        ended = self._stops.add(self._stream.flush(), counts=self._num_tokens > self._min_tokens)
        return ended + self._stops.flush()


class TextStream:
    """Ids to text, whole characters only.

    Text can't be decoded token by token: a tokenizer may drop the space before a text's first word, and characters
    span tokens. So a window of the last ids is decoded each time, and what wasn't sent yet is new. The window moves
    on, to the tokens that brought the last text, whenever no character is left open.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_settled = 0  # tokens of the window that stand before the ones that brought the last text
        self._num_sent = 0  # characters of the window's text
        self._num_open = 0  # tokens that the character left open spans so far

    def add(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        whole = text.rstrip(_REPLACEMENT)
        is_open = len(whole) < len(text)
        self._num_open = self._num_open + self._is_visible(token_id) if is_open else 0
        if len(whole) > self._num_sent:
            return self._send(whole, moves=not is_open)
        if self._num_open > _MAX_CHARACTER_TOKENS:
            return self._give_up(text)
        says_nothing = not is_open and (self._num_sent > 0 or self._window[-2:-1] == [token_id])
        if says_nothing and not self._is_visible(token_id):
            self._window.pop()  # of one that says nothing else, ever more would be decoded
        return ""

    def flush(self) -> str:
        """What is left: a character that never became whole shows as U+FFFD."""
        text = self._decode(self._window)
        left, self._num_sent = text[self._num_sent :], len(text)
        return left

    def _send(self, whole: str, *, moves: bool) -> str:
        new = whole[self._num_sent :]
        self._num_sent = len(whole)
        self._num_open = 0 if moves else 1
        if moves:
            if self._num_settled:
                del self._window[: self._num_settled]
                self._num_sent = len(self._decode(self._window))
            self._num_settled = len(self._window)
        return new

    def _give_up(self, text: str) -> str:
        """These bytes are no character, whatever follows: only the last of them may still begin one."""
        new = text[self._num_sent : -1]
        visible = [token_id for token_id in self._window if self._is_visible(token_id)]
        self._window = visible[-(_MAX_CHARACTER_TOKENS - 1) :]
        self._num_settled = 0
        self._num_sent = len(self._decode(self._window)) - 1
        self._num_open = 1
        return new

    def _is_visible(self, token_id: int) -> bool:
        """A special token is none, and is no part of a character."""
        return self._decode([token_id]) != ""


class StopStrings:
    """Finds the first of some strings in text that comes in pieces; ``found`` names it.

    Held back is the longest end of the text that begins a stop string. A match that the text so far has begun lies
    wholly within it, so the search never looks further back.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found: str | None = None

    def add(self, piece: str, *, counts: bool) -> str:
        """The text that is now final. A string that completes in a piece that doesn't count is plain text."""
        if not piece or not self._strings:
            return piece
        text = self._held + piece
        if counts:
            start = self._search(text, len(self._held))
            if self.found is not None:
                self._held = ""
                return text[:start]
        num_final = len(text) - self._num_begun(text)
        self._held = text[num_final:]
        return text[:num_final]

    def flush(self) -> str:
        """There's no more text, so what was held back is final."""
        held, self._held = self._held, ""
        return held

    def _search(self, text: str, num_searched: int) -> int:
        """Where the first string that ends beyond ``num_searched`` characters starts; sets ``found``."""
        matches = []
        for string in self._strings:
            start = text.find(string, max(0, num_searched - len(string) + 1))
            if start >= 0:
                matches.append((start + len(string), start, string))
        if not matches:
            return -1
        _, start, self.found = min(matches)
        return start

    def _num_begun(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string without completing it."""
        longest = min(len(text), max(len(string) for string in self._strings) - 1)
        for length in range(longest, 0, -1):
            end = text[-length:]
            if any(len(string) > length and string.startswith(end) for string in self._strings):
                return length
        return 0
