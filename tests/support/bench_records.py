"""Records of requests that never were, for arithmetic that is done by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shoal_lab.bench.level import Level, measured
from shoal_lab.bench.load import Load
from shoal_lab.bench.mix import Slo, parse_mix
from shoal_lab.bench.record import Failure, Record, TokenSource

MIX = parse_mix("100:11", Slo(1000, 100))
ANSWERED = Record(
    index=0, kind="100:11", is_counted=True, planned_tokens=100, max_tokens=11, arrival_s=0.0, sent_s=0.0, ttft_s=0.5,
    e2e_s=1.0, itl_s=(0.05,) * 10, prompt_tokens=100, output_tokens=11, tokens_from=TokenSource.USAGE, status=200,
)  # fmt: skip


def answered(**fields: Any) -> Record:
    return replace(ANSWERED, **fields)


def failed(failure: Failure = Failure.TIMEOUT, **fields: Any) -> Record:
    return answered(failure=failure, e2e_s=None, **fields)


def level(rate: float, hits: int, misses: int = 0, **fields: Any) -> Level:
    """``hits`` requests within both SLOs, and ``misses`` that are too slow; ``fields`` of all of them."""
    records = [answered(index=index, sent_s=float(index), arrival_s=float(index), **fields) for index in range(hits)]
    records += [answered(index=hits + index, ttft_s=2.0, e2e_s=2.5, **fields) for index in range(misses)]
    return measured(Load(rate=rate), records, 0.1, MIX)
