"""The load generator: sends a workload in an open or a closed loop, and keeps what became of each request."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from shoal.errors import ConfigError
from shoal_lab.bench.clock import Clock
from shoal_lab.bench.load import Load
from shoal_lab.bench.record import Record
from shoal_lab.bench.workload import PlannedRequest, Workload

# A client of a closed loop that got no answer: at once again, it would flood the endpoint with what it refuses.
_PAUSE_AFTER_FAILURE_S = 1.0
DEFAULT_DURATION_S = 30.0


class Sender(Protocol):
    """An endpoint, as far as a generator knows it."""

    def body(self, request: PlannedRequest) -> bytes: ...

    async def send(self, request: PlannedRequest, body: bytes, origin_s: float) -> Record: ...


@dataclass(frozen=True, slots=True)
class Amount:
    """How much is sent at one load: ``warm_up`` requests that don't count, then so many that do, or for so long."""

    warm_up: int
    num_requests: int | None = None
    duration_s: float = DEFAULT_DURATION_S

    def __post_init__(self) -> None:
        if not 0 < self.duration_s < math.inf:
            raise ConfigError(f"a duration of {self.duration_s:g} s: --duration-s must be more than 0, and finite")

    def warm_up_of(self, load: Load) -> int:
        """Of a closed loop one for each client at least: until all of them have one, it isn't that load."""
        return max(self.warm_up, load.concurrency or 0)

    def of_rate(self, rate: float) -> int:
        """Requests of an open loop in all, at least one of which counts."""
        return self.warm_up + (self.num_requests or max(1, round(rate * self.duration_s)))


@dataclass(frozen=True, slots=True)
class Sent:
    """The records of one load in the order of sending. ``cpu_share`` is of one core, used by this process meanwhile."""

    records: tuple[Record, ...]
    cpu_share: float


class Generator:
    def __init__(self, sender: Sender, workload: Workload, amount: Amount, clock: Clock) -> None:
        self._sender, self._workload, self._amount, self._clock = sender, workload, amount, clock

    async def run(self, load: Load, on_progress: Callable[[int, int], None]) -> Sent:
        """Offer ``load`` until all of it has ended. ``on_progress`` is told how many requests ended, and of how many.

        A closed loop for a duration doesn't know its number: there, seconds are told.
        """
        cpu_s, started_s = self._clock.cpu_s(), self._clock.now()
        run = _Run(load, self._sender, self._workload, self._amount, self._clock, on_progress)
        await (run.open_loop() if load.is_open else run.closed_loop())
        took_s = self._clock.now() - started_s
        share = (self._clock.cpu_s() - cpu_s) / took_s if took_s else 0.0
        return Sent(tuple(sorted(run.records, key=lambda record: record.sent_s)), round(share, 4))


class _Run:
    def __init__(
        self, load: Load, sender: Sender, workload: Workload, amount: Amount, clock: Clock,
        on_progress: Callable[[int, int], None],
    ) -> None:  # fmt: skip
        self.records: list[Record] = []
        self._load, self._sender, self._workload, self._amount = load, sender, workload, amount
        self._clock, self._on_progress = clock, on_progress
        self._warm_up = amount.warm_up_of(load)
        self._origin_s = clock.now()
        self._deadline_s: float | None = None

    async def open_loop(self) -> None:
        number = self._amount.of_rate(self._load.value)
        async with asyncio.TaskGroup() as group:
            for index, arrival_s in enumerate(self._workload.arrivals(self._load.value, number)):
                request = self._plan(index, arrival_s)
                body = self._sender.body(request)
                await self._clock.wait_until(self._origin_s + arrival_s)
                group.create_task(self._send(request, body, number))

    async def closed_loop(self) -> None:
        indices = itertools.count()
        async with asyncio.TaskGroup() as group:
            for _ in range(self._load.concurrency or 0):
                group.create_task(self._client(indices))

    async def _client(self, indices: Iterator[int]) -> None:
        """One of a closed loop's; they share ``indices``."""
        num_requests = self._amount.num_requests
        number = None if num_requests is None else self._warm_up + num_requests
        for index in indices:
            now_s = self._clock.now()
            if index == self._warm_up and number is None:
                self._deadline_s = now_s + self._amount.duration_s
            if (number is not None and index >= number) or (self._deadline_s is not None and now_s >= self._deadline_s):
                return
            request = self._plan(index)
            record = await self._send(request, self._sender.body(request), number)
            if record.failure is not None:
                await self._clock.wait_until(self._clock.now() + _PAUSE_AFTER_FAILURE_S)

    def _plan(self, index: int, arrival_s: float | None = None) -> PlannedRequest:
        is_counted = index >= self._warm_up
        return self._workload.request(self._load, index, arrival_s=arrival_s, is_counted=is_counted)

    async def _send(self, request: PlannedRequest, body: bytes, number: int | None) -> Record:
        record = await self._sender.send(request, body, self._origin_s)
        self.records.append(record)
        if number is not None:
            self._on_progress(len(self.records), number)
        else:
            self._on_progress(round(self._counting_s()), round(self._amount.duration_s))
        return record

    def _counting_s(self) -> float:
        """How much of the duration is over."""
        duration_s = self._amount.duration_s
        if self._deadline_s is None:
            return 0.0
        return min(duration_s, duration_s - (self._deadline_s - self._clock.now()))
