"""What a Ray of our own may be reached by."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shoal.cluster.ray_settings import asks_for_token, init_options, set_environment
from shoal.config import ShoalConfig


def test_a_ray_of_our_own_has_a_token_no_dashboard_and_loopback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "environ", {})
    set_environment(ShoalConfig())
    options = init_options(ShoalConfig(), tmp_path)
    assert len(bytes.fromhex(os.environ["RAY_AUTH_TOKEN"])) == 32
    assert options["include_dashboard"] is False
    assert options["_node_ip_address"] == "127.0.0.1"


def test_a_ray_that_is_joined_keeps_its_own_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = ShoalConfig.model_validate({"ray": {"address": "auto"}})
    monkeypatch.setattr(os, "environ", {})
    set_environment(config)
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert init_options(config, None) == {"address": "auto"}


@pytest.mark.parametrize("address", [None, "auto"])
def test_a_replica_that_hangs_is_ended_and_not_waited_for(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    monkeypatch.setattr(os, "environ", {})
    set_environment(ShoalConfig.model_validate({"ray": {"address": address}}))
    assert os.environ["RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS"] == "1"


@pytest.mark.parametrize("address", [None, "auto"])
def test_what_replicas_log_is_bounded(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    monkeypatch.setattr(os, "environ", {"RAY_ROTATION_BACKUP_COUNT": "9"})
    set_environment(ShoalConfig.model_validate({"ray": {"address": address}}))
    assert int(os.environ["RAY_ROTATION_MAX_BYTES"]) == 32 << 20
    assert os.environ["RAY_ROTATION_BACKUP_COUNT"] == "9", "what the user has set wins"


@pytest.mark.parametrize(("mode", "asks"), [("token", True), ("TOKEN", True), ("disabled", False), (None, False)])
def test_whether_a_cluster_asks_for_a_token_is_what_ray_says(
    monkeypatch: pytest.MonkeyPatch, mode: str | None, asks: bool
) -> None:
    monkeypatch.setattr(os, "environ", {} if mode is None else {"RAY_AUTH_MODE": mode})
    assert asks_for_token() is asks
