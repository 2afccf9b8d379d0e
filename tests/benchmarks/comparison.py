"""What a run measured: every arm in every round, and the medians and ratios that follow. Nothing else is kept."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from arms import Arm, Mode
from load import LoadOptions
from measurement import Figures


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure of a round. ``streams`` are at once; ``None``: one alone."""

    name: str
    streams: int | None = None

    @property
    def is_time(self) -> bool:
        """Less is better; the others are rates."""
        return self.streams is None

    def value(self, figures: Figures) -> float | None:
        """In seconds, or tokens a second. ``None`` where it wasn't measured."""
        if self.streams is not None:
            return figures.tokens_per_s.get(self.streams)
        samples = figures.ttft_s if self.name == "TTFT" else figures.tpot_s
        return statistics.median(samples) if samples else None


def metrics(options: LoadOptions) -> tuple[Metric, ...]:
    return (Metric("TTFT"), Metric("TPOT"), *(Metric(f"{number} streams", number) for number in options.streams))


@dataclass(slots=True)
class Measured:
    """An arm's figures by round, and by mode those of the pre-run, or why there are none.

    ``retries`` are the rounds that it needed a second time, and why. ``failure`` is why it isn't measured, or not any
    more.
    """

    arm: Arm
    mode: Mode | None = None
    trials: dict[Mode, Figures | str] = field(default_factory=dict)
    rounds: dict[int, Figures] = field(default_factory=dict)
    retries: dict[int, str] = field(default_factory=dict)
    failure: str | None = None
    version: str | None = None

    def median(self, metric: Metric) -> float | None:
        values = [value for figures in self.rounds.values() if (value := metric.value(figures)) is not None]
        return statistics.median(values) if values else None

    def to_json(self) -> dict[str, Any]:
        return {
            "what": self.arm.what,
            "version": self.version,
            "mode": self.mode,
            "skip_layers": self.arm.num_skipped,
            "weights": self.arm.weights,
            "failure": self.failure,
            "retries": self.retries,
            "trials": {mode: one if isinstance(one, str) else asdict(one) for mode, one in self.trials.items()},
            "rounds": {number: asdict(figures) for number, figures in self.rounds.items()},
        }


@dataclass(slots=True)
class Comparison:
    """``busy`` is by round the share of the machine's cores that others used."""

    settings: dict[str, Any]
    machine: dict[str, Any]
    metrics: tuple[Metric, ...]
    baseline: str
    measured: dict[str, Measured]
    busy: dict[int, float] = field(default_factory=dict)

    def speed(self, name: str, metric: Metric) -> float | None:
        """How many times as fast as the baseline: the median over rounds of the ratio within each."""
        mine, theirs = self.measured[name].rounds, self.measured[self.baseline].rounds
        ratios = []
        for number in mine.keys() & theirs.keys():
            own, base = metric.value(mine[number]), metric.value(theirs[number])
            if own is not None and base is not None:
                ratios.append(base / own if metric.is_time else own / base)
        return statistics.median(ratios) if ratios else None

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "machine": self.machine,
            "baseline": self.baseline,
            "busy": self.busy,
            "arms": {name: measured.to_json() for name, measured in self.measured.items()},
            "median": self._each(lambda name, metric: self.measured[name].median(metric)),
            "speed_over_baseline": self._each(self.speed),
        }

    def _each(self, value: Any) -> dict[str, dict[str, float | None]]:
        return {name: {metric.name: value(name, metric) for metric in self.metrics} for name in self.measured}


def best_mode(trials: Mapping[Mode, Figures | str], all_metrics: Sequence[Metric]) -> Mode | None:
    """That of the quickest pre-run, by the geometric mean of all that it measured; ``None`` if each failed."""
    times = {
        mode: statistics.geometric_mean(
            value if metric.is_time else 1 / value
            for metric in all_metrics
            if (value := metric.value(figures)) is not None
        )
        for mode, figures in trials.items()
        if not isinstance(figures, str)
    }
    return min(times, key=lambda mode: times[mode]) if times else None
