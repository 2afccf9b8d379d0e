"""How long a process's certificate is still good. Where it has none, the metric isn't there."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Gauge


class CertificateMetrics:
    """``expires_s`` tells Unix time, and is asked at each scrape, so that a file that changed is seen."""

    def __init__(self, registry: CollectorRegistry, expires_s: Callable[[], float]) -> None:
        self._expiry = Gauge(
            "shoal_certificate_expiry_timestamp_seconds",
            "When the certificate expires that this process shows to Shoal's other processes.",
            registry=registry,
        )
        self._expiry.set_function(expires_s)
