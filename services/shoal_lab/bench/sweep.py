"""Which rates find the goodput: doubled until one no longer holds, then halved in between."""

from __future__ import annotations

from collections.abc import Mapping

MAX_DOUBLINGS = 10
MAX_HALVINGS = 6
RESOLUTION = 1 / 8


def next_rate(start: float, held: Mapping[float, bool]) -> float | None:
    """The rate to measure next, after those in ``held``; ``None`` when the goodput is known to an eighth of itself.

    Where ``start`` itself doesn't hold, lower rates are tried; far away from it, either way, the search is given up.
    """
    if not held:
        return start
    good = max((rate for rate, holds in held.items() if holds), default=None)
    bad = min((rate for rate, holds in held.items() if not holds), default=None)
    if good is None or bad is None:
        rate = min(held) / 2 if good is None else max(held) * 2
        return rate if start / 2**MAX_HALVINGS <= rate <= start * 2**MAX_DOUBLINGS else None
    return None if bad - good <= good * RESOLUTION else (good + bad) / 2
