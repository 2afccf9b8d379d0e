"""What processes say of themselves in their metrics, each read once; and what of it isn't free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from shoal.telemetry.labels import BlockState, LeaseState

_TAKEN = tuple(state for state in BlockState if state is not BlockState.FREE)
# What a family's samples are called, by its type; a labelled one that was never touched has none to show it.
_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}


@dataclass(frozen=True, slots=True)
class Scraped:
    """One process' metrics. ``names`` are those its samples may have, whether there are any yet or not."""

    role: str
    replica_id: str
    names: frozenset[str]
    samples: tuple[Any, ...]

    @classmethod
    def of(cls, role: str, replica_id: str, text: str) -> Scraped:
        families = list(text_string_to_metric_families(text))
        names = {family.name + suffix for family in families for suffix in _SUFFIXES.get(family.type, ("",))}
        samples = tuple(sample for family in families for sample in family.samples)
        return cls(role, replica_id, frozenset(names), samples)

    def sum(self, name: str, labels: Mapping[str, str]) -> float:
        """Over the samples of ``name`` that have ``labels``."""
        return sum(
            float(sample.value)
            for sample in self.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


@dataclass(frozen=True, slots=True)
class Look:
    """All processes' metrics, each read once."""

    processes: tuple[Scraped, ...]

    def metric(self, name: str, role: str | None = None, **labels: str) -> float:
        """The sum of a metric's samples over all processes (of a role). KeyError if none of them has the metric."""
        return sum(self.each(name, role, **labels).values())

    def each(self, name: str, role: str | None = None, **labels: str) -> dict[str, float]:
        """The same sum for each process that has the metric, by its replica id."""
        found = {
            process.replica_id: process.sum(name, labels)
            for process in self.processes
            if role in (None, process.role) and name in process.names
        }
        if not found:
            raise KeyError(f"no {role or 'process'} has a metric {name}")
        return found

    def num_held(self, role: str) -> dict[str, float]:
        """Blocks that aren't free, of each process of ``role``, by its replica id."""
        by_state = [self.each("shoal_kv_blocks", role, state=state) for state in _TAKEN]
        return {name: sum(one[name] for one in by_state) for name in by_state[0]}

    def held(self) -> dict[str, float]:
        """What isn't free, over all processes."""
        leases = {f"{state} leases": self.metric("shoal_kv_leases", state=state) for state in LeaseState}
        blocks = {f"{state} blocks": self.metric("shoal_kv_blocks", state=state) for state in _TAKEN}
        others = {
            "pinned bytes": self.metric("shoal_kv_pinned_bytes"),
            "transfers in flight": self.metric("shoal_kv_transfers_in_flight"),
            "requests waiting": self.metric("shoal_queue_depth"),
            "requests in flight": self.metric("shoal_requests_in_flight"),
        }
        return {name: value for name, value in {**leases, **blocks, **others}.items() if value}
