"""What is offered to the endpoint: requests at a rate (open loop), or a number of clients (closed loop)."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Load:
    """Either of both. Open loop: requests arrive by a Poisson process, whatever becomes of those before them. Closed
    loop: each of ``concurrency`` clients sends its next request when its last one has ended.
    """

    rate: float | None = None
    """Requests a second."""
    concurrency: int | None = None

    @property
    def is_open(self) -> bool:
        return self.rate is not None

    @property
    def name(self) -> str:
        return f"{self.rate:g} requests/s" if self.is_open else f"{self.concurrency} at a time"

    @property
    def value(self) -> float:
        """Requests a second, or clients: where it stands on an axis."""
        return self.rate if self.rate is not None else float(self.concurrency or 0)

    @property
    def key(self) -> tuple[int, int]:
        """For seeds: equal loads have equal keys, others don't. Rates are told apart to a millionth."""
        return (1, round(self.rate * 1e6)) if self.rate is not None else (2, self.concurrency or 0)


def parse_rates(text: str, others: str = "2,4,8, or sweep, or sweep:0.25 to begin there") -> tuple[Load, ...]:
    """``2,4,8``. Raises ConfigError; ``others`` are what it says may be written."""
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(1e-3 <= rate <= 1e6 for rate in rates):
        raise ConfigError(f"--rate is {text!r}: write requests a second, like 0.5 or {others}")
    return tuple(Load(rate=rate) for rate in sorted(set(rates)))


def parse_concurrency(text: str) -> tuple[Load, ...]:
    """``1,8,32``. Raises ConfigError."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ConfigError(f"--concurrency is {text!r}: write numbers of clients, like 8 or 1,8,32")
    return tuple(Load(concurrency=count) for count in sorted(set(counts)))
