"""Who listens: TLS with and without a client's certificate, and a key that only goes where it's safe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trustme
from authorities import Authority
from callers import Caller
from fake_inference import TEXT, FakeInference, serving

from shoal.client import Client, ConfigError, PeerGone, Tls
from shoal.client.connection import is_loopback

KEY = "sk-very-secret"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def test_tls(kind: type[Caller], authority: Authority, service: FakeInference) -> None:
    with serving(service, authority.server()) as target:
        caller = kind(target, tls=Tls(authority.ca_file), api_key=KEY, timeout_s=20, max_attempts=1)
        assert caller.generate().text == TEXT
        caller.stream()
    assert [metadata["authorization"] for metadata in service.metadata] == [f"Bearer {KEY}"] * 2


def test_another_authority_isnt_trusted(
    kind: type[Caller], authority: Authority, service: FakeInference, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stranger = Authority(tmp_path_factory.mktemp("stranger"))
    with serving(service, authority.server()) as target, pytest.raises(PeerGone, match="both sides speak TLS"):
        kind(target, tls=Tls(stranger.ca_file), timeout_s=20, max_attempts=1).generate()
    assert service.num_attempts == 0


def test_mutual_tls(kind: type[Caller], authority: Authority, service: FakeInference) -> None:
    tls = Tls(authority.ca_file, authority.cert_file, authority.key_file)
    with serving(service, authority.server(asks_clients=True)) as target:
        assert kind(target, tls=tls, timeout_s=20, max_attempts=1).generate().text == TEXT
        with pytest.raises(PeerGone):
            kind(target, tls=Tls(authority.ca_file), timeout_s=20, max_attempts=1).generate()


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"ca_file": "missing.pem"}, "missing.pem"),
        ({"ca_file": "client.key"}, "client.key"),
        ({"cert_file": "client.pem"}, "key_file"),
        ({"cert_file": "client.pem", "key_file": "missing.key"}, "missing.key"),
        ({"cert_file": "client.pem", "key_file": "other.key"}, "other.key"),
        ({"cert_file": "nonsense.pem", "key_file": "client.key"}, "nonsense.pem"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value.values()),
)
def test_a_file_that_wont_do_is_named(files: dict[str, str], named: str, authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "nonsense.pem").write_text("nonsense")
    trustme.CA().issue_cert("other").private_key_pem.write_to_path(tmp_path / "other.key")
    with pytest.raises(ConfigError, match=named):
        Client(tls=Tls(**{name: tmp_path / file for name, file in files.items()}))


# --- the key --------------------------------------------------------------------------------------------


def test_without_a_key_there_is_no_authorization(caller: Caller, service: FakeInference) -> None:
    caller.generate()
    assert "authorization" not in service.metadata[0]


def test_a_key_isnt_sent_in_plain_text_to_another_machine(kind: type[Caller]) -> None:
    with pytest.raises(ConfigError, match=r"in plain text: set tls=Tls\(…\)"):
        kind("gateway.example:9000", api_key=KEY).generate()


@pytest.mark.parametrize("settings", [{"tls": Tls()}, {"allow_plain_text_key": True}], ids=["tls", "allowed"])
def test_a_key_is_sent_where_something_encrypts(settings: dict[str, Any]) -> None:
    Client("gateway.example:9000", api_key=KEY, **settings).close()


@pytest.mark.parametrize("key", ["", "two words", "sk-1\n", "schlüssel"], ids=repr)
def test_what_cant_be_a_key_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Client(api_key=key)
    assert not key or key not in str(caught.value)


def test_the_key_is_in_no_repr() -> None:
    with Client(api_key=KEY) as client:
        assert KEY not in repr(client._connection) + repr(client._connection.call())


@pytest.mark.parametrize(
    "target",
    ["localhost:9000", "localhost", "127.0.0.1:9000", "127.9.9.9:9000", "[::1]:9000", "dns:///localhost:9000",
     "ipv4:127.0.0.1:9000", "ipv6:[::1]:9000", "unix:/run/shoal.sock"],
)  # fmt: skip
def test_this_machine(target: str) -> None:
    assert is_loopback(target)


@pytest.mark.parametrize(
    "target",
    ["gateway.example:9000", "10.0.0.1:9000", "[2001:db8::1]:9000", "localhost.example:9000", "0.0.0.0:9000",
     "ipv4:127.0.0.1:9000,10.0.0.1:9000", "dns://8.8.8.8/localhost:9000", "127.0.0.1.example:9000", "xds:///localhost"],
)  # fmt: skip
def test_not_plainly_this_machine(target: str) -> None:
    assert not is_loopback(target)


# --- other settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "settings"),
    [
        ("", {}),
        ("http://127.0.0.1:8000", {}),
        ("127.0.0.1:9000", {"timeout_s": 0}),
        ("127.0.0.1:9000", {"timeout_s": float("inf")}),
        ("127.0.0.1:9000", {"timeout_s": None}),
        ("127.0.0.1:9000", {"max_attempts": 0}),
        ("127.0.0.1:9000", {"max_attempts": 6}),
        ("127.0.0.1:9000", {"max_attempts": 2.0}),
        ("127.0.0.1:9000", {"max_attempts": 2.5}),
    ],
)
def test_settings_that_cant_work_are_refused(target: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Client(target, **settings)
