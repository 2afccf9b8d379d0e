"""The gateway's metrics. Times are seconds. Thread-safe."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shoal.telemetry.labels import (
    CancelStage,
    Endpoint,
    ErrorType,
    FullDepthReason,
    HandoffReason,
    RejectReason,
    TtftStage,
    status_label,
)  # fmt: skip
from shoal.telemetry.registry import LATENCY_S, TOKEN_S
from shoal.wire.messages import TtftStages


class GatewayMetrics:
    """What clients see. ``models`` are the names served: any other name counts as ``other``."""

    def __init__(self, registry: CollectorRegistry, models: Iterable[str]) -> None:
        self._models = frozenset(models)
        self._requests = Counter(
            "shoal_requests_total",
            "Requests answered, by HTTP status and type of error.",
            ("model", "endpoint", "status", "error_type"),
            registry=registry,
        )
        self._in_flight = Gauge("shoal_requests_in_flight", "Requests being answered now.", registry=registry)
        self._duration = Histogram(
            "shoal_request_duration_seconds",
            "Seconds from a request's arrival to the end of its answer.",
            buckets=LATENCY_S,
            registry=registry,
        )
        self._ttft = Histogram(
            "shoal_time_to_first_token_seconds",
            "Seconds from a request's arrival to its first token.",
            buckets=LATENCY_S,
            registry=registry,
        )
        self._ttft_stage = Histogram(
            "shoal_ttft_stage_seconds",
            "Seconds of the time to first token that each stage took.",
            ("stage",),
            buckets=LATENCY_S,
            registry=registry,
        )
        self._inter_token = Histogram(
            "shoal_inter_token_latency_seconds",
            "Seconds between two outputs of one choice.",
            buckets=TOKEN_S,
            registry=registry,
        )
        self._per_token = Histogram(
            "shoal_time_per_output_token_seconds",
            "Mean seconds per token of a request after its first token.",
            buckets=TOKEN_S,
            registry=registry,
        )
        self._rejected = Counter(
            "shoal_rejected_total", "Requests refused before anything ran.", ("reason",), registry=registry
        )
        self._cancelled = Counter(
            "shoal_cancelled_total", "Requests whose client went away.", ("stage",), registry=registry
        )
        self._full_depth = Counter(
            "shoal_full_depth_requests_total",
            "Requests whose prompt is encoded at full depth because a field of theirs needs it.",
            ("reason",),
            registry=registry,
        )
        self._retries = Counter(
            "shoal_retries_total", "Prompts that another decode replica ran again.", ("reason",), registry=registry
        )
        self._resumes = Counter(
            "shoal_resumes_total",
            "Of those, answers that it went on with: some of their tokens had been made.",
            registry=registry,
        )

    def request_started(self) -> None:
        self._in_flight.inc()

    def request_finished(
        self, model: str, endpoint: str, status: int, duration_s: float, error_type: str = ErrorType.NONE
    ) -> None:
        """Once for each ``request_started``, however the request ended. ``error_type`` is ``ShoalError.type``."""
        self._in_flight.dec()
        name = model if model in self._models else "other"
        self._requests.labels(name, Endpoint(endpoint), status_label(status), ErrorType(error_type)).inc()
        self._duration.observe(duration_s)

    def first_token(self, ttft_s: float, gateway_s: float, stages: TtftStages) -> None:
        """``gateway_s`` is the gateway's own part, the way to decode and back included; all add up to ``ttft_s``."""
        self._ttft.observe(ttft_s)
        for stage, seconds in (
            (TtftStage.GATEWAY, gateway_s),
            (TtftStage.QUEUE, stages.queue_s),
            (TtftStage.RESERVE, stages.reserve_s),
            (TtftStage.PREFILL, stages.prefill_s),
            (TtftStage.TRANSFER_EXPOSED, stages.transfer_exposed_s),
            (TtftStage.BOUNDARY_STEP, stages.boundary_step_s),
        ):
            self._ttft_stage.labels(stage).observe(seconds)

    def next_token(self, since_last_s: float) -> None:
        self._inter_token.observe(since_last_s)

    def last_token(self, since_first_s: float, num_tokens: int) -> None:
        """The answer is complete: ``num_tokens`` of them, the first included."""
        if num_tokens > 1:
            self._per_token.observe(since_first_s / (num_tokens - 1))

    def rejected(self, reason: str) -> None:
        """``reason`` is ``ShoalError.code``."""
        self._rejected.labels(RejectReason(reason)).inc()

    def cancelled(self, stage: str) -> None:
        self._cancelled.labels(CancelStage(stage)).inc()

    def needed_full_depth(self, reason: str) -> None:
        """``reason`` is the field: a ``labels.FullDepthReason``."""
        self._full_depth.labels(FullDepthReason(reason)).inc()

    def retried(self, reason: str) -> None:
        """``reason`` is ``ShoalError.code``."""
        self._retries.labels(HandoffReason(reason)).inc()

    def resumed(self) -> None:
        self._resumes.inc()
