"""The generated-code check must be able to fail: it runs here on copies that are damaged on purpose."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
HANDOFF = Path("proto/shoal/v1/handoff.proto")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The protos and what was generated from them, in a folder that is no git repository."""
    ignore = shutil.ignore_patterns("__pycache__")
    for part in ("proto", "services/shoal/v1"):
        shutil.copytree(REPOSITORY / part, tmp_path / part, ignore=ignore)
    return tmp_path


def generate(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "proto/generate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def git(root: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_what_is_checked_in_is_what_the_protos_say(copy: Path) -> None:
    done = generate(copy, "--check")
    assert done.returncode == 0, done.stderr


def test_an_edited_generated_file_is_named(copy: Path) -> None:
    with (copy / "services/shoal/v1/handoff_pb2.pyi").open("a") as file:
        file.write("# by hand\n")
    done = generate(copy, "--check")
    assert done.returncode == 1
    assert "handoff_pb2.pyi" in done.stderr
    assert "run python proto/generate.py" in done.stderr


def test_a_left_over_file_is_named_and_writing_removes_it(copy: Path) -> None:
    left_over = copy / "services/shoal/v1/gone_pb2.py"
    left_over.write_text("")
    assert "gone_pb2.py" in generate(copy, "--check").stderr
    assert generate(copy).returncode == 0
    assert not left_over.exists()
    assert generate(copy, "--check").returncode == 0


def test_a_proto_that_breaks_the_naming_rules_is_refused(copy: Path) -> None:
    replace(copy / HANDOFF, "WIRE_MODE_HIDDEN", "HIDDEN")
    done = generate(copy)
    assert done.returncode == 1
    assert "buf lint" in done.stderr


@pytest.mark.skipif(shutil.which("git") is None, reason="compares with a git commit")
def test_a_breaking_change_is_refused_before_and_after_its_commit(copy: Path) -> None:
    git(copy, "init")
    git(copy, "add", ".")
    git(copy, "commit", "-m", "first")
    assert generate(copy, "--check").returncode == 0

    replace(copy / HANDOFF, "double ttl_s = 5;", "double ttl_s = 6;")
    assert generate(copy).returncode == 0
    uncommitted = generate(copy, "--check")
    assert uncommitted.returncode == 1
    assert "buf breaking" in uncommitted.stderr

    git(copy, "commit", "-am", "second")
    committed = generate(copy, "--check")
    assert committed.returncode == 1
    assert "buf breaking" in committed.stderr
