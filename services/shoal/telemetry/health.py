"""Whether what a replica consists of works. Told by a thread of its own, which serves even if nothing else does."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge

from shoal.telemetry.labels import Component


class HealthMetrics:
    """Any replica's. Thread-safe."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._healthy = Gauge(
            "shoal_component_healthy",
            "1 where a thread comes further, or a server serves; 0 where it doesn't, and the replica is replaced.",
            ("component",),
            registry=registry,
        )
        self._loop_lag = Gauge(
            "shoal_event_loop_lag_seconds",
            "Seconds that the event loop took to do something that was due, or hasn't done it for.",
            registry=registry,
        )

    def component(self, name: str, *, is_healthy: bool) -> None:
        """``name`` is a ``labels.Component``. Raises ValueError for another."""
        self._healthy.labels(Component(name)).set(is_healthy)

    def loop_lag(self, seconds: float) -> None:
        self._loop_lag.set(seconds)
