"""``shoal bench``: an endpoint under one load after another, and the goodput that follows.

Goodput, as DistServe defines it (arXiv 2401.09670): the highest request rate at which at least 90 % of all requests
meet both the TTFT and the TPOT objective. Failed and rejected requests met neither.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

from pydantic import TypeAdapter

from shoal.errors import ConfigError, Unavailable
from shoal_lab.bench.clock import Clock
from shoal_lab.bench.endpoint import Endpoint, EndpointOptions
from shoal_lab.bench.generator import Amount, Generator
from shoal_lab.bench.level import GOODPUT_SHARE, Level, measured
from shoal_lab.bench.load import Load
from shoal_lab.bench.mix import RequestClass
from shoal_lab.bench.record import Failure
from shoal_lab.bench.sweep import next_rate
from shoal_lab.bench.workload import PromptKind, Workload

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """``loads`` in the order in which they are offered, or none where ``sweep_from`` says at which rate to begin.

    A sweep ends where the generator falls behind, and higher rates would say no more; not if it ``goes_on_late``, as
    one that shares its cores with the endpoint must.
    """

    endpoint: EndpointOptions
    mix: tuple[RequestClass, ...]
    loads: tuple[Load, ...] = ()
    sweep_from: float | None = None
    goes_on_late: bool = False
    amount: Amount = field(default_factory=partial(Amount, warm_up=8))
    token_ids: tuple[int, int] = (1000, 30_000)
    seed: int = 0

    def settings(self, model: str) -> BenchSettings:
        """To keep with the figures; ``model`` is the one that is asked."""
        return BenchSettings(
            url=self.endpoint.url,
            model=model,
            prompts=self.endpoint.prompts,
            token_ids=self.token_ids,
            ignore_eos=self.endpoint.ignore_eos,
            extra_body=dict(self.endpoint.extra_body),
            timeout_s=self.endpoint.timeout_s,
            mix=self.mix,
            amount=self.amount,
            seed=self.seed,
            goodput_share=GOODPUT_SHARE,
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """All that the figures depend on, besides the endpoint and the machines. Keys aren't kept."""

    url: str
    model: str
    prompts: PromptKind
    token_ids: tuple[int, int]
    ignore_eos: bool
    extra_body: dict[str, Any]
    timeout_s: float
    mix: tuple[RequestClass, ...]
    amount: Amount
    seed: int
    goodput_share: float
    started_at: str
    """UTC, ISO 8601."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The result, as ``bench.json`` has it. ``levels`` are in the order in which they were measured.

    ``goodput`` is the highest of their rates that held, 0 if none did, ``None`` if there was no open loop. Where
    ``is_saturated`` is false, no higher rate was seen to fail: goodput is that or more.
    """

    settings: BenchSettings
    levels: tuple[Level, ...] = ()
    goodput: float | None = None
    is_saturated: bool = False

    @property
    def is_answered(self) -> bool:
        """Whether any request was, of any load."""
        return any(record.failure is None for level in self.levels for record in level.records)

    def with_level(self, level: Level) -> Benchmark:
        levels = (*self.levels, level)
        rates = {one.load.value: one.holds for one in levels if one.load.is_open}
        goodput = max((rate for rate, holds in rates.items() if holds), default=0.0) if rates else None
        is_saturated = any(rate > (goodput or 0.0) for rate in rates)
        return Benchmark(self.settings, levels, goodput, is_saturated)

    def to_json(self) -> str:
        """Without line breaks inside: each record has a number for each token."""
        return _BENCHMARK.dump_json(self).decode() + "\n"


_BENCHMARK = TypeAdapter(Benchmark)


async def measure(
    endpoint: Endpoint, options: BenchOptions, clock: Clock, on_progress: Progress, on_level: Callable[[Level], None]
) -> None:
    """Tells each level as soon as it is measured. Raises ConfigError or Unavailable before the first, if at all."""
    workload = Workload(options.mix, prompts=options.endpoint.prompts, token_ids=options.token_ids, seed=options.seed)
    generator = Generator(endpoint, workload, options.amount, clock)

    async def run(load: Load) -> Level:
        sent = await generator.run(load, partial(on_progress, load.name))
        level = measured(load, sent.records, sent.cpu_share, options.mix)
        on_level(level)
        return level

    await probe(endpoint, workload, clock)
    for load in options.loads:
        await run(load)
    if options.sweep_from is not None:
        await _sweep(options.sweep_from, run, goes_on_late=options.goes_on_late)


async def probe(endpoint: Endpoint, workload: Workload, clock: Clock) -> None:
    """The longest request of each class, once, so that what can't work is said before the load. Nothing is counted.

    Raises ConfigError where the endpoint refuses it, Unavailable where it can't be reached or fails.
    """
    for index in range(len(workload.mix)):
        request = workload.probe(index)
        record = await endpoint.send(request, endpoint.body(request), clock.now())
        if record.failure is None:
            continue
        said = f"a request of class {record.kind} failed ({record.failure}"
        said += f", HTTP {record.status}" if record.status not in {None, 200} else ""
        said += f"): {record.detail}"
        if record.failure is Failure.HTTP_ERROR and (record.status or 0) < 500:
            raise ConfigError(
                f"{said}; for other lengths see --mix, for endpoints that take no token ids --prompts, for fields that "
                "it doesn't know --no-ignore-eos and --extra-body, for keys --api-key-env"
            )
        raise Unavailable(f"{said}; see that the endpoint answers a single request, then start again")


async def _sweep(start: float, run: Callable[[Load], Awaitable[Level]], *, goes_on_late: bool) -> None:
    held: dict[float, bool] = {}
    rate: float | None = start
    while rate is not None:
        level = await run(Load(rate=rate))
        held[rate] = level.holds
        # Of a generator that fell behind, higher rates would say no more; lower ones do.
        is_pointless = level.is_late and level.holds and not goes_on_late
        rate = None if is_pointless else next_rate(start, held)
