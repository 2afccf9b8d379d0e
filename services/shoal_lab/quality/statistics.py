"""How sure a figure is: percentile bootstrap over the units that were drawn (passages, cases).

What is compared is measured on the same units, so units are resampled, not figures: all columns of one call see the
same resamples, and a difference or a ratio of two treatments has the interval of the pairs, not of two strangers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.errors import ConfigError
from shoal_lab.quality.limits import MIN_UNITS

Column = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure, and where its bootstrap distribution has 95 % of its mass (equal tails)."""

    value: float
    low: float
    high: float


class Bootstrap:
    """Resamples of ``sum(sizes)`` units. Units of one stratum replace one another only: their number is no chance.

    The same sizes and seed give the same resamples. Raises ConfigError if there are fewer than two units.
    """

    def __init__(self, sizes: Sequence[int], *, seed: int, num_resamples: int = 4000) -> None:
        self.num_units = sum(sizes)
        self._smallest = min((size for size in sizes if size), default=0)
        if self.num_units < 2:
            raise ConfigError(f"{self.num_units} units tell no interval: ask for 2 or more")
        rng = np.random.default_rng(seed)
        # How often a unit is drawn, instead of which units are: a resampled mean is then one product.
        counts = [rng.multinomial(size, np.full(size, 1 / size), num_resamples) for size in sizes if size]
        self._weights = np.hstack(counts) / self.num_units

    def interval(self, statistic: Callable[..., Any], *columns: Column) -> Interval:
        """``statistic`` of the columns' means, each ``[units]``; it must take arrays of means as well as floats."""
        value = float(statistic(*(column.mean() for column in columns)))
        low, high = np.quantile(statistic(*(self._weights @ column for column in columns)), (0.025, 0.975))
        return Interval(value, float(low), float(high))

    def mean(self, column: Column) -> Interval:
        return self.interval(lambda mean: mean, column)

    def difference(self, column: Column, base: Column) -> Interval:
        """Of the means: ``column - base``."""
        return self.mean(column - base)

    def recovered(self, full: Column, paper: Column, calibrated: Column) -> Interval | None:
        """The share of the paper's loss that calibration undoes, from nats a token of each unit.

        ``1 - ln(calibrated / full) / ln(paper / full)`` in perplexities. ``None`` where the paper's loss itself isn't
        told from nothing, or a stratum has fewer than ``MIN_UNITS``: a share would be noise that looks exact.
        """
        if self._smallest < MIN_UNITS or self.difference(paper, full).low <= 0:
            return None
        return self.interval(lambda loss, left: 1 - left / loss, paper - full, calibrated - full)


def ratio_of_medians(over: Column, under: Column, *, seed: int, num_resamples: int = 4000) -> Interval:
    """``median(over) / median(under)``, both measured in the same rounds: rounds are resampled, in pairs."""
    rounds = np.random.default_rng(seed).integers(len(over), size=(num_resamples, len(over)))
    ratios = np.median(over[rounds], axis=1) / np.median(under[rounds], axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Interval(float(np.median(over) / np.median(under)), float(low), float(high))
