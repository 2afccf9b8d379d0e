"""The cluster that suffers: its processes, killed, paused, replaced; what they hold; and whether all are there."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import httpx

from shoal.cluster import Cluster
from shoal.cluster.ray_settings import run_target
from shoal.config import ShoalConfig
from shoal_lab.chaos.disk import limit_files
from shoal_lab.chaos.look import Look, Scraped
from shoal_lab.chaos.proxy import Proxy
from shoal_lab.chaos.segments import abandoned, num_surplus
from shoal_lab.chaos.switchboard import Switchboard
from shoal_lab.chaos.waiting import until

if TYPE_CHECKING:
    from shoal.cluster.directory import Entry
    from shoal.wire.messages import Role

_SCRAPE_TIMEOUT_S = 10.0


class Victim:
    """``config`` is what it was started with; the proxy and the switchboard are its own."""

    def __init__(self, cluster: Cluster, config: ShoalConfig, proxy: Proxy, switchboard: Switchboard) -> None:
        self._cluster = cluster
        self._config = config
        self.proxy = proxy
        self.switchboard = switchboard
        self._gone: set[int] = set()
        self._before = abandoned()

    @property
    def _wanted(self) -> Counter[str]:
        return Counter(gateway=1, prefill=self._config.prefill.replicas, decode=self._config.decode.replicas)

    @property
    def hold_s(self) -> float:
        """How long a fault must last that no lease, and no drain, outlives."""
        return self.settle_s + 1

    @property
    def settle_s(self) -> float:
        """When everything must be free again after the last request."""
        return max(2.0, self._config.handoff.ttl_s + self._config.handoff.drain_s)

    async def entries(self, role: Role | None = None) -> tuple[Entry, ...]:
        """The replicas that are ready, but for those that were killed: who lists them may not have heard of it."""
        entries = await asyncio.to_thread(self._cluster.replica_entries, role)
        return tuple(entry for entry in entries if entry.pid not in self._gone)

    async def busiest(self, role: Role) -> tuple[Entry, ...]:
        """The same of one pool, those first that hold most: a fault that hits nobody's request shows nothing.

        If none holds anything, that's waited for, though not for long. Raises TimeoutError if there is no replica.
        """
        held: dict[str, float] = {}

        async def is_busy() -> bool:
            held.update((await self.look()).num_held(role))
            return any(held.values())

        with suppress(TimeoutError, KeyError):
            async with asyncio.timeout(self.settle_s):
                await until(is_busy)
        entries = await self.entries(role)
        if not entries:
            raise TimeoutError(f"no {role} replica is there to be hit")
        return tuple(sorted(entries, key=lambda entry: -held.get(entry.replica_id, 0.0)))

    async def is_whole(self) -> bool:
        """Whether every pool has all its replicas."""
        return Counter(entry.role for entry in await self.entries()) == self._wanted

    def kill(self, entries: Iterable[Entry]) -> None:
        """SIGKILL, as the system does to one that takes too much memory."""
        for entry in entries:
            self._gone.add(entry.pid)
            with suppress(ProcessLookupError):
                os.kill(entry.pid, signal.SIGKILL)

    @contextmanager
    def paused(self, entries: Iterable[Entry]) -> Iterator[None]:
        """They stand still: their peers' time goes on, and for them it jumps."""
        pids = [entry.pid for entry in entries]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    async def fill_disk(self, *, is_full: bool) -> None:
        """For those that run, and those that will start."""
        self.switchboard.disk_is_full = is_full
        for entry in await self.entries():
            with suppress(ProcessLookupError):
                limit_files(entry.pid, is_full=is_full)

    async def roll(self, *, skip_layers: int | None) -> None:
        """Replace all replicas by such as skip other layers (``None``: as before), as an operator's change does."""
        old = {entry.pid for entry in await self.entries()}
        model = self._config.model
        if skip_layers is not None:
            model = model.model_copy(update={"skip_layers": skip_layers})
        await asyncio.to_thread(_deploy, self._config.model_copy(update={"model": model}))

        async def is_done() -> bool:
            return not old & {entry.pid for entry in await self.entries()} and await self.is_whole()

        await until(is_done)

    async def look(self) -> Look:
        """All processes' metrics; of one that has just gone there are none."""
        async with httpx.AsyncClient(timeout=_SCRAPE_TIMEOUT_S) as client:
            scraped = await asyncio.gather(*(_scrape(client, entry) for entry in await self.entries()))
        return Look(tuple(one for one in scraped if one is not None))

    async def num_transfers(self) -> dict[str, float]:
        """Hand-offs that each decode replica has committed."""
        try:
            return (await self.look()).each("shoal_kv_transfer_seconds_count", "decode")
        except KeyError:  # no decode replica is there
            return {}

    async def left(self) -> dict[str, float]:
        """What isn't free, by name; nothing where no request is open and every pool has a replica."""
        look = await self.look()
        if silent := self._wanted - Counter(process.role for process in look.processes):  # who knows what they hold
            return {f"{role} that doesn't answer": float(number) for role, number in silent.items()}
        held = look.held()
        entries = await self.entries()
        max_sessions = {"prefill": self._config.decode.replicas, "decode": self._config.prefill.replicas}
        segments = len(abandoned() - self._before) + sum(
            num_surplus((entry.pid for entry in entries if entry.role == role), number)
            for role, number in max_sessions.items()
        )
        return held | ({"shared-memory segments": float(segments)} if segments else {})


def _deploy(config: ShoalConfig) -> None:
    from ray import serve

    from shoal_lab.chaos.replicas import REPLICAS

    serve.run_many(
        [run_target(config, REPLICAS)],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )


async def _scrape(client: httpx.AsyncClient, entry: Entry) -> Scraped | None:
    try:
        response = await client.get(f"http://{entry.metrics_address}/metrics")
    except httpx.HTTPError:
        return None
    return Scraped.of(entry.role, entry.replica_id, response.text)
