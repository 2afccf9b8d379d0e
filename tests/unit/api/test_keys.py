"""Tenants' keys: what the file may say, whom a key names, and what each may do."""

from __future__ import annotations

import hmac
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_clock import FakeClock

from shoal.api.keys import (
    Keyring,
    KeysFile,
    Tenant,
    TenantConfig,
    changing,
    digest_of,
    new_key,
    read_keys,
    write_keys,
)
from shoal.errors import ConfigError, InvalidRequest, RateLimited, Unauthenticated


class Operator:
    """Who writes the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tenants: dict[str, Any] = {}

    def give(self, tenant: str, **policy: Any) -> str:
        key, key_id = new_key()
        mine = self.tenants.setdefault(tenant, {})
        mine.update(policy)
        mine.setdefault("keys", {})[key_id] = digest_of(key)
        self.write()
        return key

    def write(self) -> None:
        write_keys(self.path, KeysFile.model_validate({"tenants": self.tenants}))


@pytest.fixture
def operator(tmp_path: Path) -> Operator:
    return Operator(tmp_path / "keys.yaml")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_a_key_names_its_tenant(operator: Operator):
    keys = {name: [operator.give(name), operator.give(name)] for name in ("alice", "bob")}
    keyring = Keyring(operator.path)
    for name, theirs in keys.items():
        assert {keyring.tenant(f"Bearer {key}").name for key in theirs} == {name}
        assert len({keyring.tenant(f"bearer {key}") for key in theirs}) == 1


def test_whatever_is_no_key_opens_nothing(operator: Operator):
    key, other = operator.give("alice"), operator.give("alice")
    keyring = Keyring(operator.path)
    id_of_one_secret_of_another = key[:17] + other[17:]
    wrong = [
        None, "", "Bearer", "Bearer ", f"Basic {key}", key, "Bearer none", f"Bearer {key[:-1]}", f"Bearer {key}x",
        f"Bearer {id_of_one_secret_of_another}", f"Bearer {new_key()[0]}", f"Bearer {digest_of(key)}", "Bearer é",
    ]  # fmt: skip
    for authorization in wrong:
        with pytest.raises(Unauthenticated) as refused:
            keyring.tenant(authorization)
        assert key not in refused.value.message


def test_a_key_is_compared_in_constant_time_whoever_it_claims_to_be(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
):
    key, unknown = operator.give("alice"), new_key()[0]
    keyring, compared = Keyring(operator.path), []

    def compare(mine: str, theirs: str) -> bool:
        compared.append((len(mine), len(theirs)))
        return hmac_compare(mine, theirs)

    hmac_compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", compare)
    keyring.tenant(f"Bearer {key}")
    for wrong in (key[:-1] + "?", unknown, "nothing like a key"):
        with pytest.raises(Unauthenticated):
            keyring.tenant(f"Bearer {wrong}")
    assert compared == [(64, 64)] * 4  # digests, as long for nobody as for somebody


def test_the_file_has_nothing_that_opens(operator: Operator):
    key = operator.give("alice")
    text = operator.path.read_text()
    assert key not in text and key[-43:] not in text
    assert stat.S_IMODE(operator.path.stat().st_mode) == 0o600
    assert [path.name for path in operator.path.parent.iterdir()] == ["keys.yaml"]


async def test_keys_come_and_go_without_a_restart(operator: Operator, clock: FakeClock):
    first = operator.give("alice")
    keyring = Keyring(operator.path, clock.time)
    with keyring.tenant(f"Bearer {first}").running():
        second = operator.give("bob")
        del operator.tenants["alice"]["keys"]
        operator.write()
        await clock.advance(0.5)
        assert keyring.tenant(f"Bearer {first}").name == "alice"  # not at every request
        await clock.advance(1)
        assert keyring.tenant(f"Bearer {second}").name == "bob"
        with pytest.raises(Unauthenticated):
            keyring.tenant(f"Bearer {first}")


async def test_a_key_that_is_exchanged_for_another_is_closed_though_the_file_is_as_long(
    operator: Operator, clock: FakeClock
):
    first = operator.give("alice")
    keyring = Keyring(operator.path, clock.time)
    size = operator.path.stat().st_size
    del operator.tenants["alice"]["keys"]
    second = operator.give("alice")
    assert operator.path.stat().st_size == size
    await clock.advance(2)
    assert keyring.tenant(f"Bearer {second}").name == "alice"
    with pytest.raises(Unauthenticated):
        keyring.tenant(f"Bearer {first}")


@pytest.mark.parametrize(
    "broken",
    ["tenants: [", "tenants: {alice: {keys: {x: y}}}", "", "false", "tenants: {a: 2024-13-45}", "[" * 1500, None],
)
async def test_a_file_that_breaks_later_takes_nobody_s_key(
    operator: Operator, clock: FakeClock, broken: str | None, caplog: pytest.LogCaptureFixture
):
    key = operator.give("alice")
    keyring = Keyring(operator.path, clock.time)
    operator.path.unlink() if broken is None else operator.path.write_text(broken)
    await clock.advance(2)
    assert keyring.tenant(f"Bearer {key}").name == "alice"
    assert "the keys stay as they were" in caplog.text
    operator.write()
    await clock.advance(2)
    assert keyring.tenant(f"Bearer {key}").name == "alice"


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"tenant": {}}, "tenant"),
        ({"tenants": {"alice": {"keys": {"0000": "0" * 64}}}}, "tenants.alice.keys"),
        ({"tenants": {"alice": {"keys": {"0" * 8: "secret"}}}}, "tenants.alice.keys"),
        ({"tenants": {"alice": {"roles": ["admin"]}}}, "tenants.alice.roles"),
        ({"tenants": {"alice": {"max_running": 0}}}, "tenants.alice.max_running"),
        ({"tenants": {"al ice": {}}}, "tenants.al ice"),
        ({"tenants": {name: {"keys": {"0" * 8: "0" * 64}} for name in ("alice", "bob")}}, "00000000 is there twice"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place_named(tmp_path: Path, tree: dict[str, Any], named: str):
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=named):
        read_keys(tmp_path / "keys.yaml")


async def test_a_tenant_that_asks_too_often_is_told_when_to_come_back(clock: FakeClock):
    tenant = Tenant("alice", TenantConfig.model_validate({"requests": {"per_s": 2, "burst": 3}}), clock.time)
    for _ in range(3):
        with tenant.running():
            pass
    with pytest.raises(RateLimited) as refused, tenant.running():
        pass
    assert refused.value.retry_after_s == pytest.approx(0.5)
    await clock.advance(0.5)
    with tenant.running():
        assert tenant.num_running == 1
    assert tenant.num_running == 0


async def test_a_tenant_s_tokens_are_counted(clock: FakeClock):
    tenant = Tenant("alice", TenantConfig(max_kv_tokens=100), clock.time)
    with pytest.raises(InvalidRequest, match="101 tokens"), tenant.holding(101):
        pass
    with tenant.holding(60):
        with pytest.raises(RateLimited, match="60 tokens are running"), tenant.holding(41):
            pass
        with tenant.holding(40):
            assert tenant.num_kv_tokens == 100
    assert tenant.num_kv_tokens == 0


async def test_a_tenant_at_its_limit_is_told_when_one_of_its_own_will_be_done(clock: FakeClock):
    tenant = Tenant("alice", TenantConfig(max_running=2, max_kv_tokens=1), clock.time)
    for _ in range(8):
        with tenant.running(), tenant.running():
            await clock.advance(6)
    with tenant.running(), tenant.running(), tenant.holding(1):
        for limited in (tenant.running(), tenant.holding(1)):
            with pytest.raises(RateLimited) as refused, limited:
                pass
            assert refused.value.retry_after_s == pytest.approx(3, rel=0.2)


async def test_who_comes_back_still_counts_what_runs(operator: Operator, clock: FakeClock):
    key = operator.give("alice", max_running=1)
    keyring = Keyring(operator.path, clock.time)
    with keyring.tenant(f"Bearer {key}").running():
        operator.path.write_text("tenants: {}")
        await clock.advance(2)
        with pytest.raises(Unauthenticated):
            keyring.tenant(f"Bearer {key}")
        operator.write()
        await clock.advance(2)
        with pytest.raises(RateLimited), keyring.tenant(f"Bearer {key}").running():
            pass


@pytest.mark.parametrize("text", ["tenants: {{alice: {{keys: {{{key}: x}}}}}}", "tenants: {{a: {key}: b"])
def test_a_key_in_the_wrong_place_is_not_told(tmp_path: Path, text: str):
    key, _ = new_key()
    (tmp_path / "keys.yaml").write_text(text.format(key=key))
    with pytest.raises(ConfigError) as refused:
        read_keys(tmp_path / "keys.yaml")
    assert key[-8:] not in refused.value.message


def test_a_tenant_that_is_there_twice_is_refused(tmp_path: Path):
    """Of two, which one's keys are known would be a matter of order."""
    (tmp_path / "keys.yaml").write_text("tenants:\n  alice: {}\n  alice: {max_running: 1}\n")
    with pytest.raises(ConfigError, match="line 3"):
        read_keys(tmp_path / "keys.yaml")


def test_a_link_leads_to_what_is_written_and_a_mode_stays(operator: Operator, tmp_path: Path):
    operator.give("alice")
    operator.path.chmod(0o640)
    link = tmp_path / "link.yaml"
    link.symlink_to(operator.path)
    write_keys(link, KeysFile())
    assert link.is_symlink() and read_keys(operator.path).tenants == {}
    assert stat.S_IMODE(operator.path.stat().st_mode) == 0o640


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_stays_its_owners(operator: Operator, monkeypatch: pytest.MonkeyPatch):
    """Else the gateway couldn't read what root changed, and a key that was revoked would stay known."""
    operator.give("alice")
    os.chown(operator.path, 1234, 2345)
    write_keys(operator.path, KeysFile())
    found = operator.path.stat()
    assert (found.st_uid, found.st_gid) == (1234, 2345)

    def forbidden(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", forbidden)
    with pytest.raises(ConfigError, match="belong to user 1234 and group 2345"):
        operator.give("bob")
    assert read_keys(operator.path).tenants == {}
    assert [entry.name for entry in operator.path.parent.iterdir()] == [operator.path.name]


def test_changes_wait_for_one_another(operator: Operator):
    with changing(operator.path):
        command = ["flock", "--nonblock", str(operator.path.parent), "true"]
        assert subprocess.run(command, check=False).returncode == 1
    assert subprocess.run(command, check=False).returncode == 0
