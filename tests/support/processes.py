"""What other processes do, of which no event tells us."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def eventually(holds: Callable[[], bool], within_s: float = 20) -> bool:
    """Whether ``holds`` becomes true in time."""
    deadline_s = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline_s:
            return False
        threading.Event().wait(0.02)
    return True


def command_lines() -> list[list[str]]:
    """Of all processes that live."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it ended just now
            lines.append(file.read_text(encoding="utf-8", errors="replace").split("\0"))
    return lines
