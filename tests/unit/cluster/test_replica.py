"""Where a replica listens, by what certificate, and what a failed call to another replica means."""

from __future__ import annotations

import asyncio
import datetime as dt
import resource
import traceback
from pathlib import Path
from typing import Any

import pytest
import structlog
from ray import cloudpickle
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError
from role_certificates import Roles

from shoal.cluster import replica
from shoal.cluster.replica import (
    Host,
    host_of_gateway,
    host_of_handoff,
    host_of_metrics,
    known_error,
    leave_no_dump,
    peer_tls,
    told_plainly,
)
from shoal.config import ShoalConfig
from shoal.errors import ConfigError, InternalError, InvalidRequest, PeerGone, Unavailable
from shoal.telemetry import CertificateMetrics, new_registry

PROMPT = "what a client wrote"
SOON = dt.datetime.now(dt.UTC).replace(microsecond=0) + dt.timedelta(days=2)


@pytest.fixture(autouse=True)
def printed_logs() -> None:
    """Whatever another test has set up."""
    structlog.reset_defaults()


def raised(cause: Exception) -> RayTaskError:
    """As a caller gets it from Ray."""
    return RayTaskError("generate", "Traceback: secret", cause)


def test_a_replica_s_own_error_is_passed_on():
    error = InvalidRequest("no such field", param="stop")
    assert known_error(raised(error), "decode") is error


@pytest.mark.parametrize("error", [ActorDiedError(), BackPressureError(1, 1), raised(ActorDiedError())], ids=repr)
def test_what_ray_says_itself_means_that_the_replica_went_away(error: Exception):
    assert isinstance(known_error(error, "decode"), PeerGone)


def test_a_defect_is_nothing_that_another_replica_could_mend():
    found = known_error(raised(ValueError("secret")), "decode")
    assert isinstance(found, InternalError) and "secret" not in found.message


@pytest.fixture
def far_node(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address that Ray knows this node by."""
    monkeypatch.setattr(replica, "_node_address", lambda: "10.1.2.3")
    return "10.1.2.3"


def test_a_node_s_own_address_is_not_bound_in_plain_text_unless_that_is_said(far_node: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"handoff\.host is 10\.1\.2\.3, .*shoal certs.*tls: off"):
        host_of_handoff(ShoalConfig(handoff={"host": "auto"}))
    told = ShoalConfig(handoff={"host": "auto"}, tls={"folder": tmp_path})
    assert host_of_handoff(told) == Host(far_node, far_node)


@pytest.mark.parametrize(("host", "warns"), [("auto", True), ("0.0.0.0", True), ("127.0.0.1", False)])
def test_plain_text_that_was_asked_for_is_warned_of_where_others_reach_it(
    far_node: str, host: str, warns: bool, capsys: pytest.CaptureFixture[str]
):
    host_of_handoff(ShoalConfig(handoff={"host": host}, tls="off"))
    assert ("tls is off" in capsys.readouterr().out) is warns


@pytest.mark.parametrize(("host", "warns"), [("auto", True), ("0.0.0.0", True), ("::", True), ("127.0.0.1", False)])
def test_metrics_that_others_reach_are_warned_of(
    far_node: str, host: str, warns: bool, capsys: pytest.CaptureFixture[str]
):
    found = host_of_metrics(ShoalConfig(metrics={"host": host}))
    assert found.bound == (far_node if host == "auto" else host)
    assert ("metrics are in plain text" in capsys.readouterr().out) is warns


TLS = {"cert_file": "tls.crt", "key_file": "tls.key"}


@pytest.mark.parametrize(
    ("gateway", "is_plain", "is_open"),
    [
        ({"host": "127.0.0.1"}, False, False),
        ({"host": "0.0.0.0"}, True, True),
        ({"host": ""}, True, True),
        ({"host": "10.1.2.3", "keys_file": "keys.yaml"}, True, False),
        ({"host": "10.1.2.3", "tls": TLS}, False, True),
        ({"host": "10.1.2.3", "tls": TLS, "keys_file": "keys.yaml"}, False, False),
        ({"host": "10.1.2.3", "tls": TLS | {"client_ca_file": "clients.crt"}}, False, False),
    ],
)
def test_a_gateway_that_others_reach_says_who_may_ask_and_read_along(
    gateway: dict[str, Any], is_plain: bool, is_open: bool, capsys: pytest.CaptureFixture[str]
):
    assert host_of_gateway(ShoalConfig(gateway=gateway).gateway, serves_http=True) == gateway["host"]
    told = capsys.readouterr().out
    assert ("in plain text" in told, "may ask" in told) == (is_plain, is_open)


@pytest.mark.parametrize(
    ("gateway", "is_plain", "is_open"),
    [
        ({"host": "127.0.0.1"}, False, False),
        ({"host": "127.0.0.1", "tls": TLS}, True, False),
        ({"host": "10.1.2.3", "tls": TLS | {"client_ca_file": "clients.crt"}}, True, True),
        ({"host": "10.1.2.3", "tls": TLS | {"client_ca_file": "clients.crt"}, "keys_file": "keys.yaml"}, True, False),
    ],
)
def test_certificates_of_clients_guard_nothing_that_comes_by_serve_s_proxy(
    gateway: dict[str, Any], is_plain: bool, is_open: bool, capsys: pytest.CaptureFixture[str]
):
    host_of_gateway(ShoalConfig(gateway=gateway).gateway, serves_http=False)
    told = capsys.readouterr().out
    assert ("in plain text" in told, "proxy may ask" in told) == (is_plain, is_open)


@pytest.mark.parametrize(
    ("bound", "own"), [("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("", "127.0.0.1"), ("10.1.2.3", "10.1.2.3")]
)
def test_a_replica_reaches_itself_where_it_listens(bound: str, own: str):
    assert Host(bound, "far.example").own == own


def test_a_private_cluster_s_node_is_loopback_and_needs_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(replica, "_node_address", lambda: "127.0.0.1")
    assert host_of_handoff(ShoalConfig(handoff={"host": "auto"})) == Host("127.0.0.1", "127.0.0.1")


EXPIRY = ("shoal_certificate_expiry_timestamp_seconds", {"shown_to": "replicas"})


def test_a_replica_s_certificate_is_its_role_s_and_its_end_is_measured(tmp_path: Path):
    roles = Roles(tmp_path)
    config, registry = ShoalConfig(tls={"folder": tmp_path}), new_registry()
    tls = peer_tls(config, "prefill", CertificateMetrics(registry))
    assert tls is not None
    assert tls.current().chain == (tmp_path / "prefill" / "tls.crt").read_bytes()
    before = registry.get_sample_value(*EXPIRY)
    assert before == tls.current().expires_s
    roles.write("prefill", not_after=SOON)
    assert registry.get_sample_value(*EXPIRY) == SOON.timestamp()


@pytest.mark.parametrize("tls", [None, "off"])
def test_without_tls_there_is_no_certificate_and_no_metric(tls: str | None):
    registry = new_registry()
    assert peer_tls(ShoalConfig(tls=tls), "decode", CertificateMetrics(registry)) is None
    assert registry.get_sample_value(*EXPIRY) is None


def pickled(error: Exception) -> bytes:
    """What Ray sends of an error, the traceback as it prints it included."""
    told = "".join(traceback.format_exception(error))
    return bytes(cloudpickle.dumps(RayTaskError("generate", told, error)))


def test_an_error_says_no_more_than_its_message_when_it_leaves_a_replica():
    with pytest.raises(Unavailable, match="try again") as caught, told_plainly():
        raise Unavailable("try again", retry_after_s=1.0) from ValueError(PROMPT)
    assert caught.value.retry_after_s == 1.0
    assert PROMPT.encode() not in pickled(caught.value)


def test_a_defect_says_nothing_when_it_leaves_a_replica():
    with pytest.raises(InternalError) as caught, told_plainly():
        raise ValueError(PROMPT)
    assert PROMPT.encode() not in pickled(caught.value)


def test_an_end_that_is_no_error_passes():
    with pytest.raises(asyncio.CancelledError), told_plainly():
        raise asyncio.CancelledError


def test_a_replica_that_crashes_leaves_no_dump() -> None:
    before = resource.getrlimit(resource.RLIMIT_CORE)
    try:
        leave_no_dump()
        # 1, and not 0, is what a program behind a pipe gets no dump at: fs/coredump.c of the kernel.
        assert resource.getrlimit(resource.RLIMIT_CORE)[0] == 1 or before[1] == 0  # which only root may raise
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)


@pytest.mark.parametrize(("pattern", "is_told"), [("|/usr/bin/a-program %p\n", True), ("core\n", False), (None, False)])
def test_where_a_program_would_get_a_dump_nonetheless_it_is_said(
    pattern: str | None, is_told: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def no_more_than_0(limit: int, limits: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    path = tmp_path / "core_pattern"
    if pattern is not None:
        path.write_text(pattern)
    monkeypatch.setattr(replica, "CORE_PATTERN", path)
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (0, 0))
    monkeypatch.setattr(resource, "setrlimit", no_more_than_0)
    leave_no_dump()
    assert ("make the hard limit of core 1" in capsys.readouterr().out) == is_told
