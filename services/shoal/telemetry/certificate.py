"""How long a process's certificates are still good. Of one that it hasn't, there is no series."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Gauge

from shoal.telemetry.labels import ShownTo


class CertificateMetrics:
    """Any replica's. Thread-safe."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._expiry = Gauge(
            "shoal_certificate_expiry_timestamp_seconds",
            "When the certificate expires that this process shows to Shoal's others, or to clients, in Unix seconds.",
            ("shown_to",),
            registry=registry,
        )

    def expires(self, shown_to: str, expires_s: Callable[[], float]) -> None:
        """``shown_to`` is a ``labels.ShownTo``. ``expires_s`` tells Unix time, and is asked at each scrape, so that a
        file that changed is seen."""
        self._expiry.labels(ShownTo(shown_to)).set_function(expires_s)
