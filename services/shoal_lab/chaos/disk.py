"""A full disk, as a process sees it: nothing can be written to a file."""

from __future__ import annotations

import resource


def limit_files(pid: int, *, is_full: bool) -> None:
    """Whether process ``pid`` (0: this one) can write to files; to those in memory neither, but to pipes and sockets.

    What it gets is EFBIG instead of a full disk's ENOSPC; to Python both are an OSError.
    """
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0 if is_full else hard, hard))
