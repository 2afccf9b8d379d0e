"""From measured times to a formula's coefficients, none of them negative, and how far it is from them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from simulation.costs import FitQuality

from shoal.errors import ConfigError


def fit(
    features: Sequence[Sequence[float]],
    seconds: Sequence[float],
    known: Sequence[float] | None = None,
    *,
    weights: Sequence[float] | None = None,
) -> tuple[list[float], FitQuality]:
    """Coefficients ``x >= 0`` for which ``features @ x``, and what is ``known`` of each time already, is nearest to
    ``seconds``, by the squares of relative errors, each times its weight, if there are any: those of a short step count
    as much as those of a long one.

    ``features`` is [samples, coefficients]. With few coefficients, the least non-negative solution is found by trying
    which of them are 0. Raises ConfigError if there are fewer samples than coefficients, or a time isn't positive.
    """
    matrix = np.asarray(features, dtype=np.float64)
    times = np.asarray(seconds, dtype=np.float64)
    if matrix.ndim != 2 or len(matrix) != len(times) or len(times) < matrix.shape[1]:
        raise ConfigError(f"{len(times)} times can't tell the coefficients of a formula: measure more of them")
    if not (times > 0).all():
        raise ConfigError("a step took no time: measure again")
    relative = matrix / times[:, None]
    left = 1 - (np.zeros(len(times)) if known is None else np.asarray(known, dtype=np.float64)) / times
    roots = np.ones(len(times)) if weights is None else np.sqrt(np.asarray(weights, dtype=np.float64))
    best, least = np.zeros(matrix.shape[1]), float(((left * roots) ** 2).sum())
    for num in range(1, matrix.shape[1] + 1):
        for chosen in itertools.combinations(range(matrix.shape[1]), num):
            found = _solve(relative * roots[:, None], left * roots, chosen)
            error = float((((relative @ found - left) * roots) ** 2).sum())
            if (found >= 0).all() and error < least:
                best, least = found, error
    errors = np.abs(relative @ best - left)
    quality = FitQuality(num=len(times), median_error=float(np.median(errors)), max_error=float(errors.max()))
    return best.tolist(), quality


def _solve(
    matrix: npt.NDArray[np.float64], wanted: npt.NDArray[np.float64], chosen: tuple[int, ...]
) -> npt.NDArray[np.float64]:
    columns = matrix[:, chosen]
    # Coefficients differ by ten orders of magnitude: columns of one length keep the solution exact.
    lengths = np.linalg.norm(columns, axis=0)
    lengths[lengths == 0] = 1.0
    found = np.zeros(matrix.shape[1])
    found[list(chosen)] = np.linalg.lstsq(columns / lengths, wanted, rcond=None)[0] / lengths
    return found
