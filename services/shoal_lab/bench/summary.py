"""What the requests of one load amount to: percentiles of those answered, and the share that met both SLOs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from shoal_lab.bench.mix import Slo
from shoal_lab.bench.record import Failure, Record

ALL = "all"
_Z = 1.959964  # of a normal distribution's middle 95 %


@dataclass(frozen=True, slots=True)
class Percentiles:
    """In seconds, with linear interpolation between the ``num`` values; ``None`` where there are none."""

    num: int
    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None
    max: float | None


@dataclass(frozen=True, slots=True)
class Share:
    """``value`` of ``num``, and its 95 % Wilson interval: how far chance alone may have moved it."""

    num: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Summary:
    """The counted requests of one class (``kind``), or of ``all``.

    Latencies are of requests answered in full; ITL is over all gaps of all of them. The shares are of all requests: one
    that failed missed everything. ``window_s`` lasts from the first request's sending to the last answer's end;
    ``requests_per_s`` and ``output_tokens_per_s`` are what was answered in it. Of a closed loop, it ends with the last
    sending of any request, and what only warmed up and was answered in it counts there, too: until then each client
    has a request, and afterwards fewer and fewer have one.
    """

    kind: str
    num_requests: int
    failures: dict[Failure, int]
    attained: Share
    attained_ttft: Share
    attained_tpot: Share
    ttft_s: Percentiles
    tpot_s: Percentiles
    itl_s: Percentiles
    e2e_s: Percentiles
    window_s: float
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens: float | None
    """The mean, as the endpoint counted."""
    output_tokens: float | None

    @property
    def num_failed(self) -> int:
        return sum(self.failures.values())


def summarize(records: Sequence[Record], slos: Mapping[str, Slo]) -> tuple[Summary, ...]:
    """``all`` first, then each class of ``slos`` if there are several. Requests that only warmed up are left out."""
    kinds = list(slos) if len(slos) > 1 else []
    busy = _busy(records)
    return (
        _summary(ALL, records, slos, busy),
        *(_summary(kind, [record for record in records if record.kind == kind], slos, busy) for kind in kinds),
    )


def percentiles(values: Iterable[float | None]) -> Percentiles:
    """Of those that aren't ``None``."""
    found = np.array([value for value in values if value is not None], dtype=np.float64)
    if not found.size:
        return Percentiles(0, None, None, None, None, None)
    p50, p90, p99 = (float(value) for value in np.percentile(found, (50, 90, 99)))
    return Percentiles(found.size, float(found.mean()), p50, p90, p99, float(found.max()))


def share(hits: int, num: int) -> Share:
    """Wilson (1927), the score interval. Of nothing, the share is 0 and may be anything."""
    if not num:
        return Share(0, 0.0, 0.0, 1.0)
    value, z2 = hits / num, _Z**2 / num
    centre = (value + z2 / 2) / (1 + z2)
    half = sqrt(value * (1 - value) * z2 + z2**2 / 4) / (1 + z2)
    return Share(num, value, max(0.0, centre - half), min(1.0, centre + half))


def _summary(kind: str, sent: Sequence[Record], slos: Mapping[str, Slo], busy: _Busy | None) -> Summary:
    records = [record for record in sent if record.is_counted]
    answered = [record for record in records if record.failure is None]
    ttft = [record.meets_ttft(slos[record.kind]) for record in records]
    tpot = [record.meets_tpot(slos[record.kind]) for record in records]
    both = [one and other for one, other in zip(ttft, tpot, strict=True)]
    window_s = busy.seconds if busy else _window_s(records)
    served = [record for record in sent if busy.has(record)] if busy else answered
    return Summary(
        kind=kind,
        num_requests=len(records),
        failures=dict(Counter(record.failure for record in records if record.failure is not None)),
        attained=share(sum(both), len(records)),
        attained_ttft=share(sum(ttft), len(records)),
        attained_tpot=share(sum(tpot), len(records)),
        ttft_s=percentiles(record.ttft_s for record in answered),
        tpot_s=percentiles(record.tpot_s for record in answered),
        itl_s=percentiles(gap for record in answered for gap in record.itl_s),
        e2e_s=percentiles(record.e2e_s for record in answered),
        window_s=window_s,
        requests_per_s=len(served) / window_s if window_s else 0.0,
        output_tokens_per_s=sum(record.output_tokens for record in served) / window_s if window_s else 0.0,
        prompt_tokens=percentiles(record.prompt_tokens for record in answered).mean,
        output_tokens=percentiles(record.output_tokens for record in answered).mean,
    )


def _window_s(records: Sequence[Record]) -> float:
    if not records:
        return 0.0
    ends = [record.sent_s + (record.e2e_s or 0.0) for record in records]
    return max(ends) - min(record.sent_s for record in records)


@dataclass(frozen=True, slots=True)
class _Busy:
    """While each client of a closed loop has a request, as seconds since the load's start."""

    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s

    def has(self, record: Record) -> bool:
        """Whether its answer ended meanwhile. What ended as this began is what made room for the first to be sent."""
        return record.e2e_s is not None and self.start_s < record.sent_s + record.e2e_s <= self.end_s


def _busy(records: Sequence[Record]) -> _Busy | None:
    """From the first sending that counts to the last one; ``None`` of an open loop, and where no answer ended then."""
    counted = [record.sent_s for record in records if record.is_counted]
    if not counted or any(record.arrival_s is not None for record in records):
        return None
    found = _Busy(min(counted), max(record.sent_s for record in records))
    return found if any(found.has(record) for record in records) else None
