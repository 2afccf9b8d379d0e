"""One load, measured: its figures, whether it held, and what keeps the figures from meaning what they seem to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from shoal_lab.bench.load import Load
from shoal_lab.bench.mix import RequestClass
from shoal_lab.bench.record import Record, TokenSource
from shoal_lab.bench.summary import Percentiles, Summary, percentiles, summarize

GOODPUT_SHARE = 0.9
# Beyond these, what was measured is the generator, or the machine that it shares.
MAX_LATENESS_SHARE = 0.1  # p99, of the shortest TTFT objective
MAX_CPU_SHARE = 0.9
FEW_REQUESTS = 100
MAX_LENGTH_ERROR = 0.1


@dataclass(frozen=True, slots=True)
class Level:
    """One load, measured. ``lateness_s`` is of an open loop's generator: how long after requests were due they left.

    ``cpu_share`` is what the generator used of one core; where it ``is_late``, the load wasn't what it should be.
    ``warnings`` are sentences.
    """

    load: Load
    summaries: tuple[Summary, ...]
    lateness_s: Percentiles
    cpu_share: float
    is_late: bool
    warnings: tuple[str, ...]
    records: tuple[Record, ...]

    @property
    def overall(self) -> Summary:
        return self.summaries[0]

    @property
    def holds(self) -> bool:
        """Whether goodput is at least this load's rate."""
        return self.overall.attained.value >= GOODPUT_SHARE


def measured(load: Load, records: Sequence[Record], cpu_share: float, mix: Sequence[RequestClass]) -> Level:
    """The figures of ``records``, which are all that were sent at ``load``."""
    summaries = summarize(records, {one.name: one.slo for one in mix})
    lateness_s = percentiles(record.lateness_s for record in records)
    max_lateness_s = MAX_LATENESS_SHARE * min(one.slo.ttft_ms for one in mix) / 1e3
    is_late = cpu_share > MAX_CPU_SHARE or (lateness_s.p99 or 0.0) > max_lateness_s
    level = Level(load, summaries, lateness_s, cpu_share, is_late, (), tuple(records))
    return replace(level, warnings=tuple(_warnings(level)))


def _warnings(level: Level) -> Iterator[str]:
    """What keeps the figures from meaning what they seem to."""
    answered = [record for record in level.records if record.is_counted and record.failure is None]
    if level.is_late:
        yield (
            f"The generator fell behind: it sent requests up to {1e3 * (level.lateness_s.max or 0):.0f} ms late, and "
            f"used {100 * level.cpu_share:.0f} % of a core. It, or the machine that it shares, was a bottleneck: give "
            "it one of its own, or less load."
        )
    if level.overall.num_requests < FEW_REQUESTS:
        yield f"{level.overall.num_requests} requests counted: p99 is near their maximum. Send more for a closer look."
    if any(record.tokens_from is TokenSource.CHUNKS for record in answered):
        yield (
            "The endpoint sent no usage: output tokens are counted as chunks, so TPOT is too high where a chunk holds "
            "several."
        )
    # Where chunks are counted, each may hold several.
    counted = (record for record in answered if record.tokens_from is TokenSource.USAGE)
    short = sum(record.output_tokens < record.max_tokens for record in counted)
    if short:
        yield f"{short} of {len(answered)} answers were shorter than asked for: the endpoint had less work than others."
    strange = sum(
        abs(record.prompt_tokens - record.planned_tokens) > MAX_LENGTH_ERROR * record.planned_tokens
        for record in answered
        if record.prompt_tokens is not None
    )
    if strange:
        yield f"{strange} of {len(answered)} prompts were more than 10 % longer or shorter than asked for."
