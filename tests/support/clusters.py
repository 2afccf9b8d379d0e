"""Running clusters for tests: asking them over HTTP, reading their metrics, and seeing that nothing is held."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from shoal.cluster import Cluster, Replicas, running
from shoal.cluster.ray_settings import set_environment
from shoal.config import ShoalConfig, load_config
from shoal_lab.chaos.look import Look, Scraped

# After a client left: two seconds, and a little for looking.
IDLE_WITHIN_S = 3.0
# At a cluster's end, when much may have run.
END_WITHIN_S = 10.0
# Between two looks at what no event tells of: to look all the time would take a core from those that are looked at.
MOMENT_S = 0.05


@dataclass(frozen=True)
class TestCluster:
    """A live cluster by its URL. ``num_by_role`` says how many processes it has."""

    url: str
    config: ShoalConfig
    num_by_role: dict[str, int]
    live: Cluster
    model: str = "smollm2"
    _num_blocks: dict[str, float] = field(default_factory=dict)
    __test__ = False

    def describe(self) -> dict[str, Any]:
        """What live replicas hold."""
        return self.live.describe()

    def kill(self, replica_id: str) -> None:
        """SIGKILL to the replica's process."""
        [entry] = [entry for entry in self.live.replica_entries() if entry.replica_id == replica_id]
        os.kill(entry.pid, signal.SIGKILL)
        self._num_blocks.pop(replica_id, None)

    def replaced(self, *replica_ids: str) -> None:
        """These have gone, and others have come."""
        self.await_whole()
        assert not {entry.replica_id for entry in self.live.replica_entries()} & set(replica_ids)
        for replica_id in replica_ids:
            self._num_blocks.pop(replica_id, None)

    def scale(self, role: str, replicas: int) -> None:
        """Let Serve add replicas to a pool, or stop some as it does on any shutdown; returns when it's done."""
        import ray  # not before the cluster has set Ray's environment
        from ray.serve._private.common import DeploymentID
        from ray.serve.context import _get_global_client

        client: Any = _get_global_client()
        controller = client._controller
        ray.get(controller.update_deployment_replicas.remote(DeploymentID(role, self.live.app), replicas))
        self.num_by_role[role] = replicas
        self._num_blocks.clear()
        self.await_whole()

    def await_whole(self, within_s: float = 60) -> None:
        """Until every pool has all its replicas again, and no other: after one was killed, Serve starts another."""
        from shoal.cluster import directory  # not before the cluster has set Ray's environment

        def is_whole() -> bool:
            entries = directory.registered(self.live.app)  # also those that finish what they have
            by_role = Counter(entry.role for entry in entries)
            return by_role == Counter(self.num_by_role) and all(entry.is_healthy for entry in entries)

        deadline_s = time.monotonic() + within_s
        while not is_whole():
            assert time.monotonic() < deadline_s, directory.registered(self.live.app)
            threading.Event().wait(MOMENT_S)

    def complete(self, prompts: Mapping[str, Sequence[int]], **fields: Any) -> dict[str, list[int]]:
        """All prompts at once, each a request of its own; the first choice's token ids."""
        return {
            name: answer["shoal"]["choices"][0]["token_ids"] for name, answer in self.ask(prompts, **fields).items()
        }

    def ask(self, prompts: Mapping[str, Sequence[int]], **fields: Any) -> dict[str, dict[str, Any]]:
        """The same with whole answers."""
        return asyncio.run(self._ask(prompts, fields))

    async def _ask(self, prompts: Mapping[str, Sequence[int]], fields: dict[str, Any]) -> dict[str, dict[str, Any]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=280, limits=limits) as client:

            async def one(ids: Sequence[int]) -> dict[str, Any]:
                body = {"model": self.model, "prompt": list(ids), "temperature": 0, "ignore_eos": True, **fields}
                response = await client.post("/v1/completions", json=body, headers={"x-shoal-timing": "1"})
                assert response.status_code == 200, response.text
                answer: dict[str, Any] = response.json()
                return answer

            answers = await asyncio.gather(*(one(ids) for ids in prompts.values()))
        return dict(zip(prompts, answers, strict=True))

    def look(self) -> Look:
        """Every process' metrics, found and read as Prometheus would; each process must be there."""
        with httpx.Client(verify=False) as client:  # there's no TLS, and certificates take long to load
            groups = client.get(f"{self.url}/metrics/targets").json()
            processes = tuple(
                Scraped.of(
                    group["labels"]["role"],
                    group["labels"]["replica"],
                    client.get(f"http://{target}/metrics").raise_for_status().text,
                )
                for group in groups
                for target in group["targets"]
            )
        assert Counter(process.role for process in processes) == self.num_by_role
        return Look(processes)

    def metric(self, name: str, role: str | None = None, **labels: str) -> float:
        """One metric of a look of its own."""
        return self.look().metric(name, role, **labels)

    @property
    def num_transfers(self) -> int:
        return int(self.metric("shoal_kv_transfer_seconds_count"))

    @property
    def num_fallbacks(self) -> int:
        return int(self.metric("shoal_kv_fallback_total"))

    def assert_nothing_held(self, within_s: float = IDLE_WITHIN_S) -> None:
        """Zero leases, zero pinned or reserved blocks, all blocks free as at the start; soon, if not at once."""
        deadline_s = time.monotonic() + within_s
        while (held := (look := self.look()).held()) and time.monotonic() < deadline_s:
            threading.Event().wait(MOMENT_S)
        assert not held, held
        self._assert_same_pools(look)

    def _assert_same_pools(self, look: Look) -> None:
        """No replica's pool has grown or shrunk. One that never ran a step doesn't say yet how large it is."""
        totals = {replica: total for replica, total in look.each("shoal_kv_blocks").items() if total}
        for replica, total in totals.items():
            assert total == self._num_blocks.setdefault(replica, total), replica
        assert self._num_blocks.keys() <= totals.keys()


def rise(before: Look, after: Look, name: str, **labels: str) -> float:
    """By how much a metric, of all processes together, rose between two looks."""
    return after.metric(name, **labels) - before.metric(name, **labels)


@contextmanager
def _that_hang(config: ShoalConfig) -> Iterator[Replicas]:
    """Replicas that can be made to hang."""
    with pytest.MonkeyPatch.context() as patch:
        tests = Path(__file__).parent
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tests), str(tests.parents[1] / "services")]))
        set_environment(config)
        from wedges import wedged  # not before: it imports Ray

        yield wedged()


@contextmanager
def cluster(*, can_hang: bool = False, **overrides: Any) -> Iterator[TestCluster]:
    """A private cluster on free ports: float32, ten skipped layers, the paper's projection, or as ``overrides`` say."""
    model = {"dtype": "float32", "skip_layers": 10, "projector": "paper"} | overrides.pop("model", {})
    gateway = {"port": 0, "grpc_port": 0} | overrides.pop("gateway", {})
    config = load_config(model=model, gateway=gateway, **overrides)
    num_by_role = {"gateway": 1, "prefill": config.prefill.replicas, "decode": config.decode.replicas}
    with _that_hang(config) if can_hang else nullcontext() as replicas, running(config, replicas=replicas) as live:
        found = TestCluster(live.url, config, num_by_role, live)
        found.assert_nothing_held()
        yield found
        found.assert_nothing_held(END_WITHIN_S)
