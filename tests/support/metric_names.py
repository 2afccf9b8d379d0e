"""The metrics that a running system exposes, and their labels: from the registries themselves."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from shoal.telemetry import (
    CertificateMetrics,
    DecodeMetrics,
    GatewayMetrics,
    HealthMetrics,
    PrefillMetrics,
    TransferMetrics,
    Transport,
    new_registry,
)

# What Prometheus adds to each series of a process: its own two, and those of /metrics/targets.
TARGET_LABELS = frozenset({"job", "instance", "role", "replica"})


@cache
def exposed() -> Mapping[str, frozenset[str]]:
    """Label names by sample name, such as ``shoal_queue_seconds_bucket``; Prometheus' own ``up`` is one of them."""
    gateway, prefill, decode = new_registry(), new_registry(), new_registry()
    GatewayMetrics(gateway, ["smollm2"])
    PrefillMetrics(prefill)
    DecodeMetrics(decode)
    TransferMetrics(decode, Transport.GRPC)
    labels: dict[str, frozenset[str]] = {"up": TARGET_LABELS}
    for registry in (gateway, prefill, decode):
        CertificateMetrics(registry)
        HealthMetrics(registry)
        _touch_everything(registry)
        for family in text_string_to_metric_families(generate_latest(registry).decode()):
            for sample in family.samples:
                labels[sample.name] = labels.get(sample.name, TARGET_LABELS) | frozenset(sample.labels)
    return labels


def _touch_everything(registry: CollectorRegistry) -> None:
    """A metric with labels has no samples before its first value."""
    for collector in registry._collector_to_names:
        if names := getattr(collector, "_labelnames", ()):
            collector.labels(*names)  # type: ignore[attr-defined]  # those that have label names are metrics
