"""How a start-up advances, for whoever draws it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """One thing that advances: ``ray``, ``replicas``, or the weights of one replica (``decode abc123``).

    A name comes again with a larger ``num_done`` until it reaches ``num_total``.
    """

    name: str
    num_done: int
    num_total: int


OnProgress = Callable[[Progress], None]
