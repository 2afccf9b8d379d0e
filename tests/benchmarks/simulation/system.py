"""Pools of simulated replicas under one load: from a planned request to the record that a client would keep.

::

    arrival ─ serving.request_s ─> decode: reserve ─> prefill: queue, chunks ═ link ═> decode: steps ─ outlet ─> client
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
from simulation.agenda import Agenda
from simulation.cores import Cores, OwnCores, SharedCores
from simulation.costs import SharingCost, StepCosts
from simulation.decode import DecodeReplica, Outlet, Request
from simulation.prefill import PrefillReplica
from simulation.routing import Routing, choose
from simulation.setting import Setting

from shoal.config import ShoalConfig
from shoal.engine.yielding import Yielding
from shoal.errors import InternalError
from shoal_lab.bench.record import Failure, Record, TokenSource
from shoal_lab.bench.workload import PlannedRequest

_ROUTING = 77  # of the seed's random numbers, those that choose replicas


@dataclass(frozen=True, slots=True)
class Fleet:
    """How many replicas of which kind. Without prefill, decode computes prompts itself.

    ``is_shared``: all of them run on one machine's cores (the costs' ``sharing``), and whatever serves, too.
    """

    num_prefill: int
    num_decode: int
    skip_layers: int
    is_shared: bool = False
    routing: Routing = Routing.TWO_CHOICES

    @property
    def num_replicas(self) -> int:
        return self.num_prefill + self.num_decode

    @property
    def name(self) -> str:
        return f"{self.num_prefill}P{self.num_decode}D, {self.skip_layers} skipped"


@dataclass(frozen=True, slots=True)
class Usage:
    """What the pools did meanwhile. Shares are of the time from the first arrival to the last end, means of a pool.

    ``in_flight`` is the mean number of requests in the system.
    """

    window_s: float
    prefill_busy: float
    decode_busy: float
    in_flight: float
    num_prefill_steps: int
    num_decode_steps: int
    num_fallbacks: int
    num_preemptions: int
    wire_bytes: int


class System:
    """One simulation: ``offer`` all requests, ``run`` once, and read ``records`` and ``usage``."""

    def __init__(self, fleet: Fleet, costs: StepCosts, config: ShoalConfig, seed: int) -> None:
        self.agenda = Agenda()
        self.records: list[Record] = []
        self._rng = np.random.default_rng([seed, _ROUTING])
        self._routing, self._costs = fleet.routing, costs
        setting = Setting(self.agenda, costs, config, fleet.skip_layers)
        self._shared = _shared(self.agenda, costs.sharing) if fleet.is_shared else None
        self.cores: Cores = self._shared or OwnCores(self.agenda)
        self.prefill = [PrefillReplica(index, setting, self.cores) for index in range(fleet.num_prefill)]
        packs = fleet.routing is Routing.TWO_CHOICES
        self._pack_prefill, self._pack_decode = (
            setting.packs_up_to(pool, is_shared=fleet.is_shared) if packs else 0
            for pool in (config.prefill, config.decode)
        )
        num_at_work = 1 if self._pack_decode else fleet.num_decode
        pause_s = setting.yield_s(num_at_work, is_shared=fleet.is_shared)
        know_one_another = fleet.is_shared and setting.are_cores_short
        yielding = Yielding(pause_s, self._are_on_their_way if know_one_another else bool)
        self.decode = [
            DecodeReplica(
                index,
                setting,
                self.cores,
                Outlet(self.cores, costs.serving),
                self.prefill,
                self._choose_prefill,
                yielding,
            )
            for index in range(fleet.num_decode)
        ]
        self._num_in_flight, self._area, self._seen_s = 0, 0.0, 0.0
        self._first_s = self._last_s = 0.0

    def offer(self, requests: Iterable[PlannedRequest]) -> None:
        """All of an open loop, ascending by arrival."""
        requests = list(requests)
        self._first_s = requests[0].arrival_s or 0.0 if requests else 0.0
        for planned in requests:
            if planned.arrival_s is None:
                raise InternalError("a simulation is an open loop: each request has its moment")
            self.agenda.at(planned.arrival_s, lambda planned=planned: self._arrive(planned))  # type: ignore[misc]

    def run(self) -> None:
        """Until every request has ended. Raises InternalError if one hasn't, or something is still held."""
        self.agenda.run()
        engines = [*(one.engine for one in self.prefill), *(one.engine for one in self.decode)]
        if self._num_in_flight or any(engine.scheduler.sequences for engine in engines):
            raise InternalError(f"{self._num_in_flight} requests never ended")
        if any(engine.scheduler.allocator.num_free < engine.scheduler.allocator.num_blocks for engine in engines):
            raise InternalError("blocks are held, and nobody is left to hold them")
        self.records.sort(key=lambda record: record.index)

    @property
    def usage(self) -> Usage:
        window_s = self._last_s - self._first_s
        decode, prefill = [one.engine for one in self.decode], [one.engine for one in self.prefill]
        return Usage(
            window_s=window_s,
            prefill_busy=_share(sum(engine.busy_s for engine in prefill), window_s * len(prefill)),
            decode_busy=_share(sum(engine.busy_s for engine in decode), window_s * len(decode)),
            in_flight=_share(self._area, window_s),
            num_prefill_steps=sum(engine.num_steps for engine in prefill),
            num_decode_steps=sum(engine.num_steps for engine in decode),
            num_fallbacks=sum(one.num_fallbacks for one in self.decode),
            num_preemptions=sum(engine.scheduler.num_preemptions for engine in decode),
            wire_bytes=sum(one.out.num_bytes for one in self.prefill),
        )

    # --- one request ----------------------------------------------------------------------------------

    def _arrive(self, planned: PlannedRequest) -> None:
        self._count(1)
        request = Request(planned, self.agenda.now_s, self._ended)
        self.cores.run(1, self._costs.serving.request_s, lambda: self._route(request))

    def _route(self, request: Request) -> None:
        choose(self.decode, self._routing, self._rng, pack_up_to=self._pack_decode).submit(request)

    def _choose_prefill(self, excluded: Collection[int]) -> PrefillReplica:
        return choose(self.prefill, self._routing, self._rng, excluded, pack_up_to=self._pack_prefill)

    def _are_on_their_way(self, _are_to_one: bool) -> bool:
        """As replicas of one machine know of one another: by what each of them has reserved."""
        return any(one.engine.scheduler.reserved for one in self.decode)

    def _ended(self, request: Request) -> None:
        self._count(-1)
        self._last_s = self.agenda.now_s
        self.records.append(_record(request))

    def _count(self, change: int) -> None:
        self._area += self._num_in_flight * (self.agenda.now_s - self._seen_s)
        self._seen_s = self.agenda.now_s
        self._num_in_flight += change


def _shared(agenda: Agenda, sharing: SharingCost | None) -> SharedCores:
    if sharing is None:
        raise InternalError("costs without sharing know of no machine that is shared")
    return SharedCores(agenda, sharing.cores, sharing.efficiency)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _record(request: Request) -> Record:
    planned, sent_s = request.planned, request.sent_s
    times = request.token_s
    is_whole = request.failure is None
    return Record(
        index=planned.index,
        kind=planned.kind,
        is_counted=planned.is_counted,
        planned_tokens=planned.prompt_tokens,
        max_tokens=planned.max_tokens,
        arrival_s=planned.arrival_s,
        sent_s=sent_s,
        ttft_s=times[0] - sent_s if times else None,
        e2e_s=times[-1] - sent_s if is_whole else None,
        itl_s=tuple(later - earlier for earlier, later in itertools.pairwise(times)),
        prompt_tokens=planned.prompt_tokens,
        output_tokens=len(times),
        tokens_from=TokenSource.USAGE,
        failure=None if is_whole else Failure.REJECTED,
        status=200 if is_whole else 429,
        detail=request.failure or "",
    )
