"""Requests that nobody waits for any more: a step of their prompts alone ends at its next layer, not with its last.

Such a step takes a second, and more on a slow machine. What it computes for a client that has left would be thrown
away, its blocks would be held meanwhile, and whoever comes next would wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Deserted(Exception):
    """Nobody waits for anything of this step."""


class Desertion:
    """Of one engine. ``leave`` is for any thread, all else for the engine's own."""

    def __init__(self) -> None:
        self._left: set[str] = set()
        self._running: Sequence[str] = ()

    def leave(self, request_id: str) -> None:
        """Nobody waits for this request; the command that ends it is to follow."""
        self._left.add(request_id)

    def ended(self, request_id: str) -> None:
        """It has: one that comes later under its name is wanted."""
        self._left.discard(request_id)

    @contextmanager
    def running(self, request_ids: Sequence[str]) -> Iterator[None]:
        """The block is a step of these requests; of none, if it's to be run in any case."""
        self._running = request_ids
        try:
            yield
        finally:
            self._running = ()

    def check(self) -> None:
        """Raises Deserted in a step of which nothing is wanted."""
        if self._left and self._running and all(request_id in self._left for request_id in self._running):
            raise Deserted
