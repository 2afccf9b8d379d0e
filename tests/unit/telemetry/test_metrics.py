"""Every metric moves, and no label can take a value that wasn't foreseen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from shoal.telemetry import (
    CertificateMetrics,
    DecodeMetrics,
    GatewayMetrics,
    HealthMetrics,
    PrefillMetrics,
    TransferMetrics,
    Transport,
)
from shoal.telemetry.labels import (
    CancelStage,
    Endpoint,
    ErrorType,
    FallbackRung,
    GrantWay,
    HandoffReason,
    LeaseState,
    Part,
    PromptWay,
    RejectReason,
    ShownTo,
    VerifyCheck,
)
from shoal.wire.handoff_messages import Carrier, CarrierReason, WireMode
from shoal.wire.messages import Depth, TtftStages

STAGES = TtftStages(reserve_s=0.01, queue_s=0.02, prefill_s=0.3, transfer_exposed_s=0.04, boundary_step_s=0.05)

Samples = dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]]


def samples(registry: CollectorRegistry) -> Samples:
    """family -> (series, labels) -> value, without when each series was created."""
    return {
        family.name: {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for sample in family.samples
            if not sample.name.endswith("_created")
        }
        for family in registry.collect()
    }


@dataclass(frozen=True)
class Role:
    name: str
    make: Callable[[CollectorRegistry], Any]
    moves: dict[str, Callable[[Any], None]]


STAGE_MOVES: dict[str, Callable[[Any], None]] = {
    "shoal_queue_depth": lambda m: m.queue_depth(3),
    "shoal_queue_seconds": lambda m: m.queued(0.2),
    "shoal_kv_blocks": lambda m: m.blocks(free=6, used=3, reserved=1),
    "shoal_kv_cache_usage_ratio": lambda m: m.blocks(free=6, used=3, reserved=1),
    "shoal_preemptions": lambda m: m.preempted(),
    "shoal_parameter_bytes": lambda m: m.parameters(held_bytes=70, full_model_bytes=100),
    "shoal_full_model_parameter_bytes": lambda m: m.parameters(held_bytes=70, full_model_bytes=100),
    "shoal_prefill_seconds": lambda m: m.prefilled(Depth.SHALLOW, 0.4, num_layers=20, computed_tokens=9),
    "shoal_prefill_tokens": lambda m: m.prefilled(Depth.FULL, 0.4, num_layers=30, computed_tokens=9, cached_tokens=4),
    "shoal_prefix_cache_queries": lambda m: m.looked_up(40, 0),
    "shoal_prefix_cache_hits": lambda m: m.looked_up(40, 32),
    "shoal_prefill_layers_run": lambda m: m.prefilled(Depth.SHALLOW, 0.4, num_layers=20, computed_tokens=9),
}
ROLES = [
    Role(
        "gateway",
        lambda registry: GatewayMetrics(registry, ["smollm2"]),
        {
            "shoal_requests": lambda m: m.request_finished("smollm2", Endpoint.COMPLETIONS, 200, 1.5),
            "shoal_requests_in_flight": lambda m: m.request_started(),
            "shoal_request_duration_seconds": lambda m: m.request_finished("smollm2", Endpoint.COMPLETIONS, 200, 1.5),
            "shoal_time_to_first_token_seconds": lambda m: m.first_token(0.5, 0.01, STAGES),
            "shoal_ttft_stage_seconds": lambda m: m.first_token(0.5, 0.01, STAGES),
            "shoal_inter_token_latency_seconds": lambda m: m.next_token(0.02),
            "shoal_time_per_output_token_seconds": lambda m: m.last_token(0.6, 4),
            "shoal_rejected": lambda m: m.rejected("overloaded"),
            "shoal_cancelled": lambda m: m.cancelled(CancelStage.STREAMING),
            "shoal_retries": lambda m: m.retried("peer_gone"),
            "shoal_resumes": lambda m: m.resumed(),
            "shoal_full_depth_requests": lambda m: m.needed_full_depth("echo"),
        },
    ),
    Role(
        "prefill",
        PrefillMetrics,
        STAGE_MOVES
        | {
            "shoal_kv_pinned_bytes": lambda m: m.pinned(4096),
            "shoal_prefill_grants": lambda m: m.granted(GrantWay.SESSION),
            "shoal_kv_sessions": lambda m: m.session_opened(Carrier.SHM, CarrierReason.SAME_HOST, WireMode.KV),
        },
    ),
    Role(
        "decode",
        DecodeMetrics,
        STAGE_MOVES
        | {
            "shoal_decode_step_seconds": lambda m: m.step(0.02, 5),
            "shoal_decode_batch_size": lambda m: m.step(0.02, 5),
            "shoal_decode_tokens": lambda m: m.decoded(5),
            "shoal_kv_choice_bytes": lambda m: m.held(9 << 20),
            "shoal_kv_fallback": lambda m: m.fell_back("local", "peer_gone"),
            "shoal_prompts": lambda m: m.went(PromptWay.CACHED),
        },
    ),
    Role(
        "transfer",
        lambda registry: TransferMetrics(registry, Transport.GRPC),
        {
            "shoal_kv_transfer_seconds": lambda m: m.transfer_committed(0.2),
            "shoal_kv_transfer_bytes": lambda m: m.shipped(Part.DEEP, 1024, Carrier.SHM),
            "shoal_kv_transfer_failures": lambda m: m.transfer_failed("lease_lost"),
            "shoal_kv_transfers_in_flight": lambda m: m.transfer_started(),
            "shoal_kv_verify_failures": lambda m: m.verify_failed(VerifyCheck.TILING),
            "shoal_kv_leases": lambda m: m.leases({"reserved": 2}),
            "shoal_kv_lease_age_seconds": lambda m: m.lease_ended(1.0),
            "shoal_kv_lease_expired": lambda m: m.lease_expired(),
            "shoal_kv_retired_bytes": lambda m: m.retired(4 << 20),
        },
    ),
    Role(
        "health",
        HealthMetrics,
        {
            "shoal_component_healthy": lambda m: m.component("engine", is_healthy=True),
            "shoal_event_loop_lag_seconds": lambda m: m.loop_lag(0.2),
        },
    ),
    Role(
        "certificate",
        CertificateMetrics,
        {"shoal_certificate_expiry_timestamp_seconds": lambda m: m.expires(ShownTo.CLIENTS, lambda: 1e9)},
    ),
]


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_every_metric_of_a_role_moves_through_its_method(role: Role) -> None:
    declared = CollectorRegistry()
    role.make(declared)
    assert set(samples(declared)) == set(role.moves), "a metric without a row here would never be seen to move"
    for family, move in role.moves.items():
        registry = CollectorRegistry()
        metrics = role.make(registry)
        before = samples(registry)[family]
        move(metrics)
        assert samples(registry)[family] != before, family


def test_ttft_stages_add_up_to_what_was_measured() -> None:
    registry = CollectorRegistry()
    GatewayMetrics(registry, []).first_token(0.43, 0.01, STAGES)
    parts = [
        value
        for (name, _), value in samples(registry)["shoal_ttft_stage_seconds"].items()
        if name == "shoal_ttft_stage_seconds_sum"
    ]
    assert len(parts) == 6
    assert math.isclose(sum(parts), 0.43)


def test_a_request_in_flight_is_gone_once_it_ended() -> None:
    registry = CollectorRegistry()
    metrics = GatewayMetrics(registry, ["smollm2"])
    metrics.request_started()
    metrics.request_started()
    metrics.request_finished("smollm2", Endpoint.CHAT_COMPLETIONS, 499, 0.1, ErrorType.CANCELLED)
    assert registry.get_sample_value("shoal_requests_in_flight") == 1


def test_transfers_in_flight_return_to_zero_however_they_end() -> None:
    registry = CollectorRegistry()
    metrics = TransferMetrics(registry, Transport.MEMORY)
    for end in (lambda: metrics.transfer_committed(0.1), lambda: metrics.transfer_failed("peer_gone")):
        metrics.transfer_started()
        assert registry.get_sample_value("shoal_kv_transfers_in_flight") == 1
        end()
        assert registry.get_sample_value("shoal_kv_transfers_in_flight") == 0


def test_a_state_without_leases_goes_back_to_zero() -> None:
    registry = CollectorRegistry()
    metrics = TransferMetrics(registry, Transport.MEMORY)
    metrics.leases({LeaseState.STREAMING: 2})
    metrics.leases({LeaseState.SEALED: 1})
    assert registry.get_sample_value("shoal_kv_leases", {"state": "streaming"}) == 0
    assert registry.get_sample_value("shoal_kv_leases", {"state": "sealed"}) == 1


def test_one_answered_token_has_no_time_per_token() -> None:
    registry = CollectorRegistry()
    metrics = GatewayMetrics(registry, [])
    metrics.last_token(0.0, 1)
    metrics.last_token(0.9, 4)
    assert registry.get_sample_value("shoal_time_per_output_token_seconds_count") == 1
    assert registry.get_sample_value("shoal_time_per_output_token_seconds_sum") == pytest.approx(0.3)


def test_what_clients_write_never_becomes_a_label() -> None:
    registry = CollectorRegistry()
    metrics = GatewayMetrics(registry, ["smollm2"])
    for number in range(50):
        metrics.request_finished(f"model-{number}", f"/path/{number}", 600 + number, 0.1, f"type-{number}")
        metrics.rejected(f"reason-{number}")
    series = samples(registry)
    assert list(series["shoal_requests"]) == [
        (
            "shoal_requests_total",
            (("endpoint", "other"), ("error_type", "other"), ("model", "other"), ("status", "other")),
        )
    ]
    assert list(series["shoal_rejected"]) == [("shoal_rejected_total", (("reason", "other"),))]


def test_what_peers_write_never_becomes_a_label() -> None:
    registry = CollectorRegistry()
    transfer, decode = TransferMetrics(registry, Transport.GRPC), DecodeMetrics(registry)
    for number in range(50):
        transfer.transfer_failed(f"reason-{number}")
        transfer.verify_failed(f"check-{number}")
        decode.fell_back(FallbackRung.LOCAL, f"reason-{number}")
    series = samples(registry)
    assert [len(series[f"shoal_kv_{name}"]) for name in ("transfer_failures", "verify_failures", "fallback")] == [1] * 3


def test_reasons_are_codes_of_the_error_tree_or_ours() -> None:
    from shoal import errors

    codes = {value.code for value in vars(errors).values() if isinstance(value, type) and hasattr(value, "code")}
    own = {"last_attempt", "no_prefill", "other", "prefill_queue_timeout"}
    assert {reason.value for reason in HandoffReason} <= codes | own
    assert {reason.value for reason in RejectReason} <= codes | own
    types = {value.type for value in vars(errors).values() if isinstance(value, type) and hasattr(value, "type")}
    assert types <= {kind.value for kind in ErrorType}, "a new error type needs a label"
