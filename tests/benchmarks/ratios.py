"""How many times as long one thing takes as another that was measured in turns with it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def median_ratio(times_s: Sequence[float], others_s: Sequence[float]) -> float:
    """The median of the ratios within a round: what changes the machine's pace between rounds is in neither. Both have
    one time a round, in their order."""
    return statistics.median(one / other for one, other in zip(times_s, others_s, strict=True))
