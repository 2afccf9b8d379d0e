"""Which ratio of prefill to decode replicas, and which skip count, bears the most: each is simulated under load."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from pydantic import TypeAdapter
from simulation.agenda import Agenda
from simulation.bound import bound
from simulation.costs import StepCosts
from simulation.setting import Setting
from simulation.system import Fleet, System, Usage

from shoal.config import ShoalConfig
from shoal.errors import ConfigError
from shoal_lab.bench.generator import Amount
from shoal_lab.bench.level import GOODPUT_SHARE, Level, measured
from shoal_lab.bench.load import Load
from shoal_lab.bench.mix import RequestClass
from shoal_lab.bench.sweep import RESOLUTION, next_rate
from shoal_lab.bench.workload import PlannedRequest, PromptKind, Workload

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """``loads`` of every fleet; none to search for each one's goodput. ``amount`` is how much is sent at each."""

    costs: StepCosts
    config: ShoalConfig
    fleets: tuple[Fleet, ...]
    mix: tuple[RequestClass, ...]
    loads: tuple[Load, ...]
    amount: Amount
    seed: int


@dataclass(frozen=True, slots=True)
class SimulatedLevel:
    """One load: its figures as those of ``shoal bench`` (without each request's), and what the pools did."""

    level: Level
    usage: Usage


@dataclass(frozen=True, slots=True)
class Outcome:
    """One fleet. ``goodput`` is the highest rate that held, 0 if none did; where ``is_saturated`` is false, no higher
    one was seen to fail.
    """

    fleet: Fleet
    levels: tuple[SimulatedLevel, ...]
    goodput: float
    is_saturated: bool

    @property
    def at_goodput(self) -> SimulatedLevel | None:
        return next((one for one in self.levels if one.level.load.value == self.goodput), None)


@dataclass(frozen=True, slots=True)
class Plan:
    """The result, as ``simulation.json`` has it. ``machine`` and ``model`` are the costs'."""

    machine: str
    model: str
    mix: tuple[RequestClass, ...]
    amount: Amount
    seed: int
    goodput_share: float
    outcomes: tuple[Outcome, ...]

    @property
    def best(self) -> Outcome:
        """The highest goodput. Those less than it by no more than the search may be wrong are equal: of them, that
        which skips least, then that of the fewest replicas."""
        least = max(one.goodput for one in self.outcomes) * (1 - RESOLUTION)
        equal = [one for one in self.outcomes if one.goodput >= least]
        return min(equal, key=lambda one: (one.fleet.skip_layers, one.fleet.num_replicas, -one.goodput))

    def to_json(self) -> str:
        return _PLAN.dump_json(self, indent=2).decode() + "\n"


_PLAN = TypeAdapter(Plan)


def make_plan(options: PlanOptions, on_progress: Progress) -> Plan:
    """Simulate every fleet. Raises ConfigError before the first, if at all."""
    for fleet in options.fleets:
        _check(fleet, options)
    outcomes = []
    for index, fleet in enumerate(options.fleets):
        on_progress("fleets", index, len(options.fleets))
        outcomes.append(simulate(fleet, options))
    on_progress("fleets", len(options.fleets), len(options.fleets))
    costs = options.costs
    return Plan(
        costs.machine, costs.model, options.mix, options.amount, options.seed, GOODPUT_SHARE,
        tuple(outcomes),
    )  # fmt: skip


def simulate(fleet: Fleet, options: PlanOptions) -> Outcome:
    """One fleet under all of its loads."""
    levels = [simulate_load(fleet, options, load) for load in options.loads]
    if not options.loads:
        start = _start(fleet, options)
        held: dict[float, bool] = {}
        rate: float | None = start
        while rate is not None:
            levels.append(simulate_load(fleet, options, Load(rate=rate)))
            held[rate] = levels[-1].level.holds
            rate = next_rate(start, held)
    levels.sort(key=lambda one: one.level.load.value)
    goodput = max((one.level.load.value for one in levels if one.level.holds), default=0.0)
    return Outcome(fleet, tuple(levels), goodput, any(one.level.load.value > goodput for one in levels))


def simulate_load(fleet: Fleet, options: PlanOptions, load: Load) -> SimulatedLevel:
    system = System(fleet, options.costs, options.config, options.seed)
    system.offer(planned_requests(options, load))
    system.run()
    level = measured(load, system.records, 0.0, options.mix)
    return SimulatedLevel(replace(level, records=()), system.usage)


def planned_requests(options: PlanOptions, load: Load) -> list[PlannedRequest]:
    """The same lengths at the same moments as ``shoal bench`` sends them by the same seed and mix."""
    workload = Workload(options.mix, prompts=PromptKind.IDS, token_ids=(0, 0), seed=options.seed)
    arrivals = workload.arrivals(load.value, options.amount.of_rate(load.value))
    return [
        workload.request(load, index, arrival_s=arrival_s, is_counted=index >= options.amount.warm_up)
        for index, arrival_s in enumerate(arrivals)
    ]


def ratios(num_replicas: int) -> list[tuple[int, int]]:
    """All ways to part them into prefill and decode, one of each at least. Raises ConfigError."""
    if num_replicas < 2:
        raise ConfigError(f"--replicas is {num_replicas}: a pool of each kind needs one replica at least")
    return [(num_prefill, num_replicas - num_prefill) for num_prefill in range(1, num_replicas)]


def _start(fleet: Fleet, options: PlanOptions) -> float:
    """Half of what pools without queues would bear; of costs that are all 0, one a second."""
    rate = bound(fleet, options.costs, options.config, options.mix).overall / 2
    return float(f"{rate:.3g}") if math.isfinite(rate) and rate > 0 else 1.0


def _check(fleet: Fleet, options: PlanOptions) -> None:
    if fleet.num_decode < 1 or fleet.num_prefill < 0:
        raise ConfigError(f"{fleet.name}: there must be a decode replica")
    if fleet.is_shared and options.costs.sharing is None:
        raise ConfigError(
            "these costs don't say how replicas share a machine (sharing): leave out --shared, or measure it"
        )
    options.costs.of_skip(fleet.skip_layers)
    setting = Setting(Agenda(), options.costs, options.config, fleet.skip_layers)
    pools = {"prefill": setting.prefill_scheduler(), "decode": setting.decode_scheduler()}
    longest = {
        "prefill": max(one.prompt_tokens[1] for one in options.mix),
        "decode": max(one.prompt_tokens[1] + one.output_tokens[1] for one in options.mix),
    }
    for name, scheduler in pools.items():
        if scheduler.num_tokens_held < (most := longest[name]):
            raise ConfigError(
                f"a request of {most} tokens doesn't fit {name}'s pool of {scheduler.num_tokens_held}: see --mix, and "
                f"{name}.num_blocks or the costs' {name}_pool_tokens"
            )
