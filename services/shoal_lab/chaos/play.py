"""Scenarios on a cluster that runs: load, fault, recovery, and what is left when all is quiet."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from shoal.cluster import Cluster
from shoal.config import ShoalConfig
from shoal_lab.chaos.injections import Lost, Scene
from shoal_lab.chaos.load import End, Load, loading
from shoal_lab.chaos.look import Look, Scraped
from shoal_lab.chaos.proxy import DECODE_HOST, PROXY_HOST, proxying
from shoal_lab.chaos.result import Result
from shoal_lab.chaos.scenario import Scenario, Sign
from shoal_lab.chaos.switchboard import Switchboard
from shoal_lab.chaos.truth import Script
from shoal_lab.chaos.victim import Victim
from shoal_lab.chaos.waiting import until

Progress = Callable[[str, int, int], None]

_REPAIRS = (
    "shoal_kv_fallback_total", "shoal_retries_total", "shoal_resumes_total", "shoal_kv_transfer_failures_total",
    "shoal_kv_verify_failures_total",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Limits:
    """``num_requests`` is the least of a scenario, ``num_in_flight`` how many of them are under way at any time,
    ``deadline_s`` what each has. What a scenario does, say replacing all replicas, ends within ``inject_within_s``, and
    all is well again ``recover_within_s`` after that."""

    num_requests: int = 64
    num_in_flight: int = 40
    deadline_s: float = 240.0
    inject_within_s: float = 360.0
    recover_within_s: float = 180.0


class Play:
    """One cluster and all that it suffers."""

    def __init__(
        self,
        cluster: Cluster,
        config: ShoalConfig,
        switchboard: Switchboard,
        script: Script,
        limits: Limits,
        on_progress: Progress,
    ) -> None:
        self._cluster = cluster
        self._config = config
        self._switchboard = switchboard
        self._script = script
        self._limits = limits
        self._on_progress = on_progress

    async def run(self, scenarios: Sequence[Scenario], on_result: Callable[[Result], None]) -> None:
        """One after the other; each ends when all is quiet."""
        ports = self._config.handoff.port_range
        async with proxying(PROXY_HOST, DECODE_HOST, range(ports.first, ports.last + 1)) as proxy:
            victim = Victim(self._cluster, self._config, proxy, self._switchboard)
            for scenario in scenarios:
                on_result(await self._suffer(victim, scenario))

    async def _suffer(self, victim: Victim, scenario: Scenario) -> Result:
        clock, limits, gateway = asyncio.get_running_loop(), self._limits, self._config.gateway
        began_s, recovered_s = clock.time(), None
        async with loading(
            f"{gateway.host}:{gateway.grpc_port}",
            self._script.cases,
            self._script.right(under_both_plans=scenario.changes_plan),
            num_in_flight=limits.num_in_flight,
            deadline_s=limits.deadline_s,
        ) as load:
            before, num_in_flight = await victim.look(), 0
            with suppress(TimeoutError):
                # Some have ended before anything happens: what is under way then is in all stages of its life.
                await _until(load, lambda: bool(load.outcomes) and load.num_open >= limits.num_in_flight, limits)
                before, num_in_flight = await victim.look(), load.num_open
                scene = Scene(victim, load, self._script.burst, self._script.skip_layers, limits.inject_within_s)
                recovered_s = await _recover(scene, scenario, limits)
            try:
                if num_in_flight:  # or the fault never came, and nobody is answered
                    await _until(load, lambda: self._are_enough(scenario, load), limits)
            except TimeoutError:
                recovered_s = None  # whatever was seen: nobody is answered any more
        left = await _left(victim)
        return Result.of(
            scenario.name,
            scenario.says,
            load.outcomes,
            num_in_flight=num_in_flight,
            repairs=_repairs(before, await victim.look()),
            recovered_s=recovered_s,
            left=left,
            duration_s=clock.time() - began_s,
        )

    def _are_enough(self, scenario: Scenario, load: Load) -> bool:
        num_done, num_wanted = len(load.outcomes), self._limits.num_requests
        self._on_progress(scenario.name, min(num_done, num_wanted), num_wanted)
        return num_done >= num_wanted


async def _until(load: Load, holds: Callable[[], bool], limits: Limits) -> None:
    """As ``Load.until``. Raises TimeoutError if no request begins or ends for longer than any may take: those that were
    refused wait for a gateway that doesn't come back."""
    while not holds():
        known = len(load.outcomes), load.num_open
        async with asyncio.timeout(limits.deadline_s + limits.recover_within_s):
            await load.until(lambda known=known: holds() or (len(load.outcomes), load.num_open) != known)  # type: ignore[misc]


async def _recover(scene: Scene, scenario: Scenario, limits: Limits) -> float:
    """Do what the scenario says; how long after the fault every sign of recovery was seen. Raises TimeoutError."""
    clock = asyncio.get_running_loop()
    async with asyncio.timeout(limits.inject_within_s), scenario.inject(scene) as lost:
        if scenario.holds:
            await asyncio.sleep(scene.victim.hold_s)
    over_s = clock.time()
    async with asyncio.timeout(limits.recover_within_s):
        transfers = await scene.victim.num_transfers()
        for sign in scenario.signs:
            await until(lambda sign=sign: _is_seen(sign, scene, lost, over_s, transfers))  # type: ignore[misc]
    return clock.time() - over_s


async def _is_seen(sign: Sign, scene: Scene, lost: Lost, over_s: float, transfers: dict[str, float]) -> bool:
    match sign:
        case Sign.WHOLE:
            return await scene.victim.is_whole()
        case Sign.ANSWER:
            return any(one.started_s >= over_s and one.end is End.CORRECT for one in scene.load.outcomes)
        case Sign.HANDOFF:
            now = await scene.victim.num_transfers()
            return any(number > transfers.get(replica, 0) for replica, number in now.items())
        case Sign.SAME_ADDRESS:
            addresses = {entry.handoff_address for entry in await scene.victim.entries("decode")}
            return {entry.handoff_address for entry in lost} <= addresses


async def _left(victim: Victim) -> dict[str, float]:
    """What is still held when everything must be free."""
    left = {"what nobody could tell": 1.0}

    async def is_free() -> bool:
        found = await victim.left()  # if it doesn't come, what was found before stands
        left.clear()
        left.update(found)
        return not left

    with suppress(TimeoutError):
        async with asyncio.timeout(victim.settle_s):
            await until(is_free)
    return left


def _repairs(before: Look, after: Look) -> dict[str, int]:
    """How often decode refused what came, or decode or the gateway took another way, by which and why; of the processes
    that are there."""
    was = {key: value for process in before.processes for key, value in _counted(process)}
    risen: Counter[str] = Counter()
    for process in after.processes:
        for key, value in _counted(process):
            risen[key[1]] += int(value - was.get(key, 0.0))
    return dict(+risen)


def _counted(process: Scraped) -> Iterator[tuple[tuple[str, str], float]]:
    for sample in process.samples:
        if sample.name in _REPAIRS:
            name = sample.name.removeprefix("shoal_").removesuffix("_total")
            yield (process.replica_id, " ".join([name, *sample.labels.values()])), sample.value
