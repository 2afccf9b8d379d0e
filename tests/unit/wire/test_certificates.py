"""A process's own files: whatever is wrong with them is said by name, before a peer finds out."""

from __future__ import annotations

import datetime as dt
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme
from role_certificates import YESTERDAY, Roles

from shoal.errors import ConfigError
from shoal.wire.certificates import AUTHORITY_FILE, CHAIN_FILE, KEY_FILE, name_of, read_certificate

TOMORROW = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)


@pytest.fixture
def roles(tmp_path: Path) -> Roles:
    return Roles(tmp_path / "certs")


def test_what_is_read_is_what_is_there(roles: Roles):
    end = dt.datetime.now(dt.UTC).replace(microsecond=0) + dt.timedelta(days=3)
    roles.write("decode", not_after=end)
    found = read_certificate(roles.folder, "decode")
    home = roles.folder / "decode"
    files = (home / AUTHORITY_FILE, home / CHAIN_FILE, home / KEY_FILE)
    assert [found.authorities, found.chain, found.key] == [path.read_bytes() for path in files]
    assert found.expires_s == end.timestamp()


def test_an_authority_below_another_one_will_do_with_its_certificate_in_the_chain(tmp_path: Path):
    root = trustme.CA()
    below = root.create_child_ca()
    issued = below.issue_cert(name_of("prefill"))
    home = tmp_path / "prefill"
    home.mkdir()
    root.cert_pem.write_to_path(home / AUTHORITY_FILE)
    issued.private_key_pem.write_to_path(home / KEY_FILE)
    for number, pem in enumerate(issued.cert_chain_pems):
        pem.write_to_path(home / CHAIN_FILE, append=number > 0)
    assert len(issued.cert_chain_pems) == 2
    read_certificate(tmp_path, "prefill")
    issued.cert_chain_pems[0].write_to_path(home / CHAIN_FILE)
    with pytest.raises(ConfigError, match="isn't signed by an authority"):
        read_certificate(tmp_path, "prefill")


def lost(name: str) -> Callable[[Roles], None]:
    return lambda roles: (roles.folder / "decode" / name).unlink()


def garbled(name: str) -> Callable[[Roles], None]:
    def garble(roles: Roles) -> None:
        (roles.folder / "decode" / name).write_bytes(b"no PEM")

    return garble


def of_prefill(name: str) -> Callable[[Roles], None]:
    def copy(roles: Roles) -> None:
        shutil.copy(roles.folder / "prefill" / name, roles.folder / "decode" / name)

    return copy


def of_another_authority(roles: Roles) -> None:
    other = Roles(roles.folder / "other")
    shutil.copy(other.folder / "decode" / AUTHORITY_FILE, roles.folder / "decode" / AUTHORITY_FILE)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lost(AUTHORITY_FILE), r"can't read .*decode/ca\.crt: No such file"),
        (lost(CHAIN_FILE), r"can't read .*decode/tls\.crt: No such file.*shoal certs"),
        (lost(KEY_FILE), r"can't read .*decode/tls\.key: No such file"),
        (garbled(AUTHORITY_FILE), r"ca\.crt holds no PEM certificate"),
        (garbled(CHAIN_FILE), r"tls\.crt holds no PEM certificate"),
        (garbled(KEY_FILE), r"tls\.key isn't an unencrypted PEM key"),
        (of_prefill(KEY_FILE), r"tls\.key isn't the key of .*tls\.crt"),
        (of_another_authority, r"tls\.crt isn't signed by an authority in .*ca\.crt"),
        (lambda roles: roles.write("decode", name=name_of("prefill")), r"isn't decode's: .*decode\.shoal\.internal"),
        (lambda roles: roles.write("decode", not_before=TOMORROW), r"tls\.crt isn't valid before "),
        (lambda roles: roles.write("decode", not_after=YESTERDAY), r"tls\.crt expired on .*shoal certs --force"),
    ],
)
def test_what_is_wrong_is_said_by_its_name(roles: Roles, spoil: Callable[[Roles], None], message: str):
    read_certificate(roles.folder, "decode")
    spoil(roles)
    with pytest.raises(ConfigError, match=message):
        read_certificate(roles.folder, "decode")
