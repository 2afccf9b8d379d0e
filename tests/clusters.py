"""Running clusters for tests: asking them over HTTP, reading their metrics, and seeing that nothing is held."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from shoal.app.cluster import running
from shoal.config import load_config

IDLE_WITHIN_S = 10.0


@dataclass(frozen=True)
class TestCluster:
    """A live cluster by its URL."""

    url: str
    model: str = "smollm2"
    __test__ = False

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

    def metric(self, name: str, role: str | None = None, **labels: str) -> float:
        """The sum of a metric's samples over all processes (of a role), as Prometheus would find and read them."""
        return sum(
            sample.value
            for sample in self._samples(role)
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def _samples(self, role: str | None) -> Iterable[Any]:
        for group in httpx.get(f"{self.url}/metrics/targets").json():
            if role is None or group["labels"]["role"] == role:
                for target in group["targets"]:
                    for family in text_string_to_metric_families(httpx.get(f"http://{target}/metrics").text):
                        yield from family.samples

    @property
    def num_transfers(self) -> int:
        return int(self.metric("shoal_kv_transfer_seconds_count"))

    @property
    def num_fallbacks(self) -> int:
        return int(self.metric("shoal_kv_fallback_total"))

    def held(self) -> dict[str, float]:
        """What isn't free right now, over all processes."""
        leases = {
            state: self.metric("shoal_kv_leases", state=state)
            for state in ("reserved", "streaming", "sealed", "committed", "cancelling", "quarantined", "retired")
        }
        blocks = {f"{state} blocks": self.metric("shoal_kv_blocks", state=state) for state in ("used", "reserved")}
        others = {
            "pinned bytes": self.metric("shoal_kv_pinned_bytes"),
            "transfers in flight": self.metric("shoal_kv_transfers_in_flight"),
            "requests waiting": self.metric("shoal_queue_depth"),
            "requests in flight": self.metric("shoal_requests_in_flight"),
        }
        return {name: value for name, value in {**leases, **blocks, **others}.items() if value}

    def assert_nothing_held(self, within_s: float = IDLE_WITHIN_S) -> None:
        """Zero leases, zero pinned or reserved blocks, all blocks free as at the start; soon, if not at once."""
        deadline_s = time.monotonic() + within_s
        while (held := self.held()) and time.monotonic() < deadline_s:
            pass  # each look is a few HTTP requests: no need to sleep between them
        assert not held, held


@contextmanager
def cluster(**overrides: Any) -> Iterator[TestCluster]:
    """A private cluster on free ports, in float32 with ten skipped layers unless ``overrides`` say otherwise."""
    model = {"dtype": "float32", "skip_layers": 10} | overrides.pop("model", {})
    gateway = {"port": 0, "grpc_port": 0} | overrides.pop("gateway", {})
    with running(load_config(model=model, gateway=gateway, **overrides)) as live:
        found = TestCluster(live.url)
        yield found
        found.assert_nothing_held()
