"""Shared memory that nobody needs any more: names whose owner is dead, and mappings without a session."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterable
from pathlib import Path

from shoal.handoff.carriers.shm import FOLDER, NAME

_MAPPING = re.compile(r"^\S+ \S+ \S+ \S+ (\d+) +" + re.escape(f"{FOLDER}/") + NAME.pattern, re.MULTILINE)


def abandoned(folder: Path = FOLDER) -> frozenset[str]:
    """Names of staging segments whose owner is dead: it would hold a lock on them."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return frozenset(path.name for path in paths if NAME.fullmatch(path.name) and not _is_locked(path))


def num_mapped(maps: str) -> int:
    """Staging segments in a process' memory, by what ``/proc/PID/maps`` says of it."""
    return len(set(_MAPPING.findall(maps)))


def num_surplus(pids: Iterable[int], max_sessions: int) -> int:
    """Segments that ``pids`` hold beyond one for each session that each of them can have."""
    return sum(max(0, num_mapped(_maps(pid)) - max_sessions) for pid in pids)


def _maps(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
    except OSError:  # it has ended, or this is another system
        return ""


def _is_locked(path: Path) -> bool:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # another user's, or gone
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False
