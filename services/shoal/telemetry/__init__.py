"""What a process tells about itself: metrics, the port they are read from, and logs."""

from shoal.telemetry.certificate import CertificateMetrics
from shoal.telemetry.gateway import GatewayMetrics
from shoal.telemetry.health import HealthMetrics
from shoal.telemetry.labels import (
    CancelStage,
    Component,
    Endpoint,
    ErrorType,
    FallbackRung,
    HandoffReason,
    LeaseState,
    Part,
    ShownTo,
    Transport,
    VerifyCheck,
)
from shoal.telemetry.logs import bind_request, configure_logging
from shoal.telemetry.registry import new_registry
from shoal.telemetry.server import MetricsServer, Target, serve_metrics, targets_document
from shoal.telemetry.stage import DecodeMetrics, PrefillMetrics, StageMetrics
from shoal.telemetry.transfer import TransferMetrics

__all__ = [
    "CancelStage",
    "CertificateMetrics",
    "Component",
    "DecodeMetrics",
    "Endpoint",
    "ErrorType",
    "FallbackRung",
    "GatewayMetrics",
    "HandoffReason",
    "HealthMetrics",
    "LeaseState",
    "MetricsServer",
    "Part",
    "PrefillMetrics",
    "ShownTo",
    "StageMetrics",
    "Target",
    "TransferMetrics",
    "Transport",
    "VerifyCheck",
    "bind_request",
    "configure_logging",
    "new_registry",
    "serve_metrics",
    "targets_document",
]
