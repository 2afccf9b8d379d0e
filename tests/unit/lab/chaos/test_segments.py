from __future__ import annotations

import fcntl
from pathlib import Path

from shoal_lab.chaos.segments import abandoned, num_mapped

NAME, OTHER = "shoal-" + "0" * 32, "shoal-" + "1" * 32
MAPS = f"""\
7f0000000000-7f0000001000 rw-s 00000000 00:19 11                         /dev/shm/{NAME} (deleted)
7f0000001000-7f0000002000 r--s 00001000 00:19 11                         /dev/shm/{NAME} (deleted)
7f0000002000-7f0000003000 rw-s 00000000 00:19 12                         /dev/shm/{OTHER}
7f0000003000-7f0000004000 rw-s 00000000 00:19 13                         /dev/shm/plasma
7f0000004000-7f0000005000 rw-p 00000000 00:00 0
"""


def test_a_segment_is_abandoned_once_nobody_holds_its_lock(tmp_path: Path):
    (tmp_path / "plasma").touch()
    with (tmp_path / NAME).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert abandoned(tmp_path) == frozenset()
    assert abandoned(tmp_path) == {NAME}
    assert abandoned(tmp_path / "nowhere") == frozenset()


def test_mapped_segments_are_counted_once_each():
    assert num_mapped(MAPS) == 2
