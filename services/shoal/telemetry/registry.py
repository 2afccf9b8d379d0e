"""Where a process keeps its metrics, and the buckets they share.

One registry a replica: two roles of the same class over one registry would name a metric twice, which
prometheus-client refuses. Which pool and replica a series comes from is said by its scrape target (server.py).
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

# Upper bounds in seconds, from a decode step on a fast card (1 ms) to the longest deadline (10 min).
LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0)
TOKEN_S = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# From 256 KiB to 4 GiB.
KV_BYTES = tuple(float(1 << power) for power in range(18, 33, 2))


def new_registry() -> CollectorRegistry:
    """An empty registry with what this process uses of its machine (memory, CPU, file descriptors, collections)."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry
