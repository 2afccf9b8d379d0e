"""``shoal keys``: what it writes is what a gateway reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from shoal.api.keys import Keyring, read_keys
from shoal.cli import app
from shoal.errors import ConfigError, InvalidRequest, Unauthenticated


def keys(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["keys", *map(str, arguments)])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def made(file: Path, tenant: str, *options: object) -> str:
    """The key alone is on standard output, so that it can be piped."""
    done = keys("new", tenant, "--file", file, *options)
    assert done.exit_code == 0, done.output
    [key] = done.stdout.split()
    return key


def test_a_key_that_was_made_opens_and_one_taken_back_does_not(file: Path):
    first, second, other = made(file, "alice"), made(file, "alice"), made(file, "bob")
    keyring = Keyring(file)
    assert [keyring.tenant(f"Bearer {key}").name for key in (first, second, other)] == ["alice", "alice", "bob"]
    assert keys("revoke", first.split("-")[2], "--file", file).exit_code == 0
    keyring = Keyring(file)
    assert keyring.tenant(f"Bearer {second}").name == "alice"
    with pytest.raises(Unauthenticated):
        keyring.tenant(f"Bearer {first}")


def test_limits_are_as_asked_for_and_stay_until_something_else_is(file: Path):
    key = made(file, "alice", "--max-running", 3, "--max-kv-tokens", 5000)
    alice = Keyring(file).tenant(f"Bearer {key}")
    assert (alice.config.max_running, alice.config.max_kv_tokens) == (3, 5000)
    with pytest.raises(InvalidRequest), alice.holding(5001):
        pass
    made(file, "alice", "--max-kv-tokens", 7000)
    bob = made(file, "bob")
    assert [(one.max_running, one.max_kv_tokens) for _, one in sorted(read_keys(file).tenants.items())] == [
        (3, 7000),
        (None, None),
    ]
    with Keyring(file).tenant(f"Bearer {bob}").holding(10**9):
        pass


def test_what_was_edited_by_hand_stays(file: Path):
    file.write_text("tenants: {alice: {requests: {per_s: 5, burst: 20}, max_running: 2}}\n")
    made(file, "alice")
    alice = read_keys(file).tenants["alice"]
    assert (alice.max_running, alice.requests and alice.requests.burst, len(alice.keys)) == (2, 20, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["new", "al ice"], "tenants"),
        (["new", "alice", "--role", "admin"], "roles"),
        (["revoke", "00000000"], "has no key 00000000"),
    ],
)
def test_what_can_not_be_is_refused_and_changes_nothing(file: Path, arguments: list[str], said: str):
    made(file, "bob")
    before = file.read_text()
    done = keys(*arguments, "--file", file)
    assert isinstance(done.exception, ConfigError) and said in done.exception.message
    assert file.read_text() == before


def test_the_list_has_no_secret(file: Path):
    key = made(file, "alice", "--max-running", 7, "--max-kv-tokens", 4321)
    done = keys("list", "--file", file)
    assert done.exit_code == 0
    row = next(line for line in done.output.splitlines() if "alice" in line)
    assert all(text in row for text in (key.split("-")[2], "7", "4321"))
    assert key not in done.output
