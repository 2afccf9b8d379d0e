"""What a prefill replica makes of ``handoff.carrier``."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from shoal.config import HandoffConfig
from shoal.messages import Carrier, CarrierReason
from shoal.prefill import stage
from shoal.telemetry import PrefillMetrics
from shoal.telemetry.logs import FIELDS


def test_inline_makes_no_segment() -> None:
    assert stage._staging(HandoffConfig(carrier="inline")) is None


@pytest.mark.parametrize("carrier", ["auto", "shm"])
def test_segments_are_as_configured_and_the_dead_ones_reaped_at_the_start(
    carrier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reaped: list[bool] = []
    monkeypatch.setattr(stage, "reap", lambda: reaped.append(True) or 1)  # type: ignore[func-returns-value]
    make = stage._staging(HandoffConfig(carrier=carrier, slot_bytes=1 << 16, staging_bytes=1 << 20))  # type: ignore[arg-type]
    assert make is not None and reaped
    loader = make()
    loader.close()
    assert (loader.segment.slot_bytes, loader.segment.num_slots) == (1 << 16, 15)  # heads take room, too
    assert not Path("/dev/shm", loader.segment.name).exists()


@pytest.mark.parametrize(
    ("wants_shm", "carrier", "reason", "level"),
    [
        (False, Carrier.INLINE, CarrierReason.OTHER_HOST, "info"),
        (True, Carrier.SHM, CarrierReason.SAME_HOST, "info"),
        (True, Carrier.INLINE, CarrierReason.NO_ROOM, "warning"),
    ],
)
def test_which_carrier_and_why_is_counted_and_logged(
    wants_shm: bool, carrier: Carrier, reason: CarrierReason, level: str
) -> None:
    registry = CollectorRegistry()
    session = SimpleNamespace(carrier=carrier, carrier_reason=reason)
    with capture_logs() as logs:
        stage._session_opened(PrefillMetrics(registry), wants_shm, "10.0.0.1:21000", session)  # type: ignore[arg-type]
    labels = {"carrier": carrier.value, "reason": reason.value}
    assert registry.get_sample_value("shoal_kv_sessions_total", labels) == 1
    assert set(logs[0]) - {"log_level"} <= FIELDS
    assert [(entry["log_level"], entry["carrier"], entry["reason"]) for entry in logs] == [(level, carrier, reason)]
