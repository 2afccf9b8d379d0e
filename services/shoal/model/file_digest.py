"""SHA-256 of a whole file, kept in the user's cache: of large weights it takes seconds."""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

from platformdirs import user_cache_path

_RECENT_NS = 2_000_000_000
"""Within it a file may be written twice at what its file system calls one time."""


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of all bytes. They are read again only if path, size, inode, mtime or ctime is another."""
    stamp, kept = _stamp(path), user_cache_path("shoal") / "digests" / _sha256(str(path))
    found = _read(kept, stamp)
    if found is not None:
        return found
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if _stamp(path) == stamp and time.time_ns() - path.stat().st_ctime_ns > _RECENT_NS:
        with suppress(OSError):  # no cache can be written: it's hashed at each start
            _write(kept, f"{digest} {_sha256(stamp + digest)}")
    return digest


def _stamp(path: Path) -> str:
    found = path.stat()
    return f"{path} {found.st_size} {found.st_ino} {found.st_mtime_ns} {found.st_ctime_ns} "


def _read(kept: Path, stamp: str) -> str | None:
    """The digest, unless what is kept is damaged, or of another stamp."""
    try:
        digest, _, check = kept.read_text("ascii").partition(" ")
    except (OSError, ValueError):
        return None
    return digest if check == _sha256(stamp + digest) else None


def _write(kept: Path, text: str) -> None:
    kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = kept.with_name(f"{kept.name}.{os.getpid()}")
    part.write_text(text, "ascii")
    part.replace(kept)


def _sha256(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()
