"""The hand-off's metrics. Times are seconds, sizes bytes. Thread-safe."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shoal.telemetry.labels import HandoffReason, LeaseState, Part, Transport, VerifyCheck
from shoal.telemetry.registry import LATENCY_S
from shoal.wire.handoff_messages import Carrier


class TransferMetrics:
    """Hand-offs over one transport, as one side sees them."""

    def __init__(self, registry: CollectorRegistry, transport: Transport) -> None:
        self._transport = transport
        self._seconds = Histogram(
            "shoal_kv_transfer_seconds",
            "Seconds from a lease's claim to its commit.",
            ("transport",),
            buckets=LATENCY_S,
            registry=registry,
        )
        self._bytes = Counter(
            "shoal_kv_transfer_bytes_total",
            "Bytes of payload shipped.",
            ("transport", "carrier", "part"),
            registry=registry,
        )
        self._failures = Counter(
            "shoal_kv_transfer_failures_total", "Hand-offs that failed.", ("reason",), registry=registry
        )
        self._in_flight = Gauge("shoal_kv_transfers_in_flight", "Hand-offs under way.", registry=registry)
        self._verify_failures = Counter(
            "shoal_kv_verify_failures_total", "Checks that received K/V did not pass.", ("check",), registry=registry
        )
        self._leases = Gauge("shoal_kv_leases", "Leases that hold something, by state.", ("state",), registry=registry)
        self._lease_age = Histogram(
            "shoal_kv_lease_age_seconds", "Seconds a lease lived.", buckets=LATENCY_S, registry=registry
        )
        self._lease_expired = Counter(
            "shoal_kv_lease_expired_total", "Leases that ended because nobody renewed them.", registry=registry
        )
        self._retired = Gauge(
            "shoal_kv_retired_bytes",
            "Bytes of buffers that are used no more, since a one-sided read of a session that is over may fill them.",
            registry=registry,
        )

    def transfer_started(self) -> None:
        self._in_flight.inc()

    def transfer_committed(self, seconds: float) -> None:
        self._in_flight.dec()
        self._seconds.labels(self._transport).observe(seconds)

    def transfer_failed(self, reason: str) -> None:
        """A transfer that had started ended without a commit. ``reason`` is an error's code."""
        self._in_flight.dec()
        self._failures.labels(HandoffReason(reason)).inc()

    def shipped(self, part: str, num_bytes: int, carrier: Carrier) -> None:
        """Payload bytes of a ``labels.Part``. Raises ValueError for any other."""
        self._bytes.labels(self._transport, carrier, Part(part)).inc(num_bytes)

    def verify_failed(self, check: str) -> None:
        self._verify_failures.labels(VerifyCheck(check)).inc()

    def leases(self, num_by_state: Mapping[str, int]) -> None:
        """How many leases are in each ``labels.LeaseState``; a state that isn't named has none."""
        for state in LeaseState:
            self._leases.labels(state).set(num_by_state.get(state, 0))

    def lease_ended(self, age_s: float) -> None:
        self._lease_age.observe(age_s)

    def lease_expired(self) -> None:
        self._lease_expired.inc()

    def retired(self, num_bytes: int) -> None:
        """So many bytes are, all together."""
        self._retired.set(num_bytes)
