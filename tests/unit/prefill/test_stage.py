"""What a prefill replica makes of ``handoff.carrier``."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from shoal.backends.cpu.copying import Copier
from shoal.config import HandoffConfig, ShoalConfig
from shoal.decode import stage as decode_stage
from shoal.errors import ConfigError
from shoal.handoff.carriers.nixl import process
from shoal.handoff.carriers.nixl.process import nixl_for
from shoal.handoff.carriers.shm import ShmLoader
from shoal.prefill import stage
from shoal.telemetry import PrefillMetrics
from shoal.telemetry.logs import FIELDS
from shoal.wire.handoff_messages import Carrier, CarrierReason, WireMode


def test_without_nixl_auto_does_without_and_asking_for_it_says_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "is_installed", lambda: False)
    assert nixl_for("auto") is None
    with pytest.raises(ConfigError, match=r"handoff.carrier is nixl, .* pip install 'shoal\[nixl\]'"):
        nixl_for("nixl")


def test_what_tls_encrypts_goes_by_nixl_only_where_that_is_asked_for_by_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process, "is_installed", lambda: True)
    monkeypatch.setattr(process.Nixl, "warm_up", lambda nixl: None)
    caplog.set_level("INFO")
    assert nixl_for("auto") is not None and not caplog.records
    assert nixl_for("auto", is_encrypted=True) is None
    assert "NIXL isn't used, since tls doesn't cover it" in caplog.text
    assert nixl_for("nixl", is_encrypted=True) is not None
    assert "tls doesn't cover NIXL" in caplog.text


@pytest.mark.parametrize("tls", [None, "off", {"folder": "certificates"}], ids=str)
async def test_both_stages_say_whether_the_hand_off_is_encrypted(tls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    def ask(*_of: object, is_encrypted: bool) -> None:
        raise Asked(is_encrypted)

    monkeypatch.setattr(stage, "nixl_for", ask)
    monkeypatch.setattr(decode_stage, "nixl_for", ask)
    config = ShoalConfig(tls=tls)
    for opened in (
        stage.open_prefill(config, CollectorRegistry()),
        decode_stage.open_decode(config, CollectorRegistry(), None, num_replicas=1),
    ):
        with pytest.raises(Asked) as asked:
            await opened.__aenter__()
        assert asked.value.args == (isinstance(tls, dict),)


@pytest.mark.parametrize(
    ("carrier", "ways"),
    [("auto", (True, True)), ("shm", (True, False)), ("nixl", (False, True)), ("inline", (False, False))],
)
def test_a_carrier_is_tried_where_it_is_allowed(
    carrier: str, ways: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "is_installed", lambda: True)
    monkeypatch.setattr(stage, "reap", lambda: 0)
    monkeypatch.setattr(process.Nixl, "warm_up", lambda nixl: None)
    made = stage._staging(HandoffConfig(carrier=carrier), nixl_for(carrier), Copier())  # type: ignore[arg-type]
    assert (made.local is not None, made.remote is not None) == ways


@pytest.mark.parametrize("carrier", ["auto", "shm"])
def test_segments_are_as_configured_and_the_dead_ones_reaped_at_the_start(
    carrier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reaped: list[bool] = []
    monkeypatch.setattr(stage, "reap", lambda: reaped.append(True) or 1)  # type: ignore[func-returns-value]
    config = HandoffConfig(carrier=carrier, slot_bytes=1 << 16, staging_bytes=1 << 20)  # type: ignore[arg-type]
    make = stage._staging(config, None, Copier())
    assert make.local is not None and reaped
    loader = make.local()
    assert isinstance(loader, ShmLoader)
    loader.close()
    assert (loader.segment.slot_bytes, loader.segment.num_slots) == (1 << 16, 15)  # heads take room, too
    assert not Path("/dev/shm", loader.segment.name).exists()


@pytest.mark.parametrize(
    ("wanted", "carrier", "reason", "level"),
    [
        ("auto", Carrier.INLINE, CarrierReason.OTHER_HOST, "info"),
        ("auto", Carrier.NIXL, CarrierReason.OTHER_HOST, "info"),
        ("inline", Carrier.INLINE, CarrierReason.CONFIGURED, "info"),
        ("shm", Carrier.SHM, CarrierReason.SAME_HOST, "info"),
        ("shm", Carrier.INLINE, CarrierReason.NO_ROOM, "warning"),
        ("nixl", Carrier.NIXL, CarrierReason.CONFIGURED, "info"),
        ("nixl", Carrier.INLINE, CarrierReason.NO_NIXL, "warning"),
    ],
)
def test_which_carrier_and_why_is_counted_and_logged(
    wanted: str, carrier: Carrier, reason: CarrierReason, level: str
) -> None:
    registry = CollectorRegistry()
    session = SimpleNamespace(carrier=carrier, carrier_reason=reason, wire_mode=WireMode.KV)
    with capture_logs() as logs:
        stage._session_opened(PrefillMetrics(registry), wanted, "10.0.0.1:21000", session)  # type: ignore[arg-type]
    labels = {"carrier": carrier.value, "reason": reason.value, "wire_mode": "kv"}
    assert registry.get_sample_value("shoal_kv_sessions_total", labels) == 1
    assert set(logs[0]) - {"log_level"} <= FIELDS
    assert [(entry["log_level"], entry["carrier"], entry["reason"]) for entry in logs] == [(level, carrier, reason)]
