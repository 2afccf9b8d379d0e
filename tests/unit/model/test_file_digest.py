"""The digest of a whole file, and when it's read again."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import pytest

from shoal.model.file_digest import file_digest

DATA = bytes(range(256)) * 4096


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were hashed, a minute after they were written."""
    names: list[str] = []
    hash_file, now_ns = hashlib.file_digest, time.time_ns

    def hash_and_note(file: Any, name: str) -> Any:
        names.append(Path(file.name).name)
        return hash_file(file, name)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashlib, "file_digest", hash_and_note)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + 60_000_000_000)
    return names


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(DATA)
    return tmp_path / "weights"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def kept_in(tmp_path: Path) -> Path:
    [kept] = (tmp_path / "cache" / "shoal" / "digests").iterdir()
    return kept


def test_a_file_is_read_once(weights: Path, reads: list[str]):
    assert [file_digest(weights) for _ in range(3)] == [sha256(weights)] * 3
    assert reads == ["weights"]


def test_files_with_one_name_are_told_apart(weights: Path, reads: list[str], tmp_path: Path):
    other = tmp_path / "elsewhere" / "weights"
    other.parent.mkdir()
    other.write_bytes(DATA[1:])
    for path in (weights, other) * 2:
        assert file_digest(path) == sha256(path)
    assert len(reads) == 2


@pytest.mark.parametrize("in_place", [True, False])
def test_another_byte_is_noticed_whatever_the_times_say(weights: Path, reads: list[str], in_place: bool):
    before, times = file_digest(weights), weights.stat()
    if in_place:
        with weights.open("r+b") as file:
            file.seek(len(DATA) // 2)
            file.write(b"x")
    else:
        other = weights.with_name("other")
        other.write_bytes(b"x" + DATA[1:])
        other.replace(weights)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_digest(weights) == sha256(weights) != before
    assert len(reads) == 2


@pytest.mark.parametrize("damage", ["empty", "cut", "other digest", "no text", "folder"])
def test_a_damaged_cache_is_ignored_and_mended(weights: Path, reads: list[str], tmp_path: Path, damage: str):
    file_digest(weights)
    kept = kept_in(tmp_path)
    text = kept.read_text()
    other = "0" if text[0] != "0" else "1"
    damages = {"empty": b"", "cut": text[:-1].encode(), "other digest": (other + text[1:]).encode(), "no text": b"\xff"}
    if damage == "folder":
        kept.unlink()
        kept.mkdir()
    else:
        kept.write_bytes(damages[damage])
    assert [file_digest(weights) for _ in range(2)] == [sha256(weights)] * 2
    assert len(reads) == (3 if damage == "folder" else 2)


def test_where_nothing_can_be_kept_it_is_read_each_time(weights: Path, reads: list[str], tmp_path: Path):
    (tmp_path / "cache").touch()
    assert [file_digest(weights) for _ in range(2)] == [sha256(weights)] * 2
    assert len(reads) == 2


def test_what_was_written_just_now_is_not_kept(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file system may give a write that follows the same time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "time_ns", lambda: weights.stat().st_ctime_ns)
    assert file_digest(weights) == sha256(weights)
    assert not (tmp_path / "cache").exists()
