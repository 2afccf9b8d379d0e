"""Whether a series that should stay level does, though it's noisy: no leak, or one, and how much of it.

Two things must come together to be called growth. A trend that isn't chance: of all pairs of samples, far more rise
than fall (Kendall's S, which knows no outliers, against what it would be by chance). And a rise that matters: the
median of all pairs' slopes (Theil and Sen), over the time that was looked at, is more than an allowance. What was
measured in the warm-up doesn't count: there, caches and pools become as large as they will be.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

_CHANCE = 3.0
"""Standard deviations of S: once in 700 series that don't grow."""
FEWEST = 8
"""So many samples at least. Of six, even those that all rise could be chance."""


@dataclass(frozen=True, slots=True)
class Trend:
    """Over ``time_s`` a series of median ``level`` rose by ``rise``; ``sigmas`` is how unlike chance it is."""

    level: float
    rise: float
    sigmas: float
    time_s: float

    def grows(self, allowance: float) -> bool:
        return self.rise > allowance and self.sigmas > _CHANCE


def trend_of(times_s: Sequence[float], values: Sequence[float]) -> Trend:
    """Of at least one sample, in order."""
    pairs = list(combinations(zip(times_s, values, strict=True), 2))
    slopes = [(later - value) / (after_s - at_s) for (at_s, value), (after_s, later) in pairs]
    slope = statistics.median(slopes) if slopes else 0.0
    score = sum((later > value) - (later < value) for (_, value), (_, later) in pairs)
    time_s = times_s[-1] - times_s[0]
    return Trend(statistics.median(values), slope * time_s, score / _deviation(values), time_s)


def _deviation(values: Sequence[float]) -> float:
    """Of S, were the order of ``values`` chance. Those that are alike can't say anything about it."""
    number = len(values)
    ties = [values.count(value) for value in set(values)]
    variance = number * (number - 1) * (2 * number + 5) - sum(tie * (tie - 1) * (2 * tie + 5) for tie in ties)
    return math.sqrt(variance / 18) or 1.0
