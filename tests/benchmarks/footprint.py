"""What a process holds of its machine, as Linux tells it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_SEGMENT = re.compile(r"/dev/shm/shoal-")


@dataclass(frozen=True, slots=True)
class Footprint:
    """``memory_bytes`` are its own pages alone: those of files come and go as the system likes."""

    memory_bytes: int
    num_files: int
    num_threads: int
    num_segments: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        """Raises OSError if it doesn't run any more."""
        folder = Path(f"/proc/{pid}")
        status = dict(re.findall(r"^(\w+):\s+(\d+)", (folder / "status").read_text(encoding="utf-8"), re.MULTILINE))
        maps = (folder / "maps").read_text(encoding="utf-8")
        return cls(
            int(status["RssAnon"]) << 10,
            sum(1 for _ in (folder / "fd").iterdir()),
            int(status["Threads"]),
            len(_SEGMENT.findall(maps)),
        )
