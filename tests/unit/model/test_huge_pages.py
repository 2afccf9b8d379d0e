from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch

from shoal.model import huge_pages
from shoal.model.huge_pages import runs, use_huge_pages

KIB = 1 << 10


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([], []),
        ([(8, 9), (0, 4)], [(0, 9)]),
        ([(0, 100 * KIB), (10 * KIB, 20 * KIB)], [(0, 100 * KIB)]),
        (
            [(0, 1), (64 * KIB + 1, 64 * KIB + 2), (128 * KIB + 3, 256 * KIB)],
            [(0, 64 * KIB + 2), (128 * KIB + 3, 256 * KIB)],
        ),
    ],
    ids=["none", "close together", "one within another", "too far apart"],
)
def test_what_lies_close_together_is_one_run(ranges: list[tuple[int, int]], expected: list[tuple[int, int]]) -> None:
    assert list(runs(ranges)) == expected


def num_huge_bytes() -> int:
    told = re.search(r"AnonHugePages: *(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    assert told is not None
    return int(told[1]) * KIB


def are_given() -> bool:
    """Whether the system moves any memory to huge pages."""
    try:
        with mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE) as memory:
            memory.write(b"1" * len(memory))
            memory.madvise(huge_pages._COLLAPSE)
    except OSError:
        return False
    return huge_pages._SIZE.exists()


@pytest.mark.skipif(not are_given(), reason="this system gives no huge pages: Linux before 6.1, or without them")
def test_weights_are_moved_to_huge_pages_and_stay_what_they_are() -> None:
    weights = [torch.full((256, 1024), float(index)) for index in range(64)]  # 1 MiB each
    others = torch.ones(3, device="meta")
    before = num_huge_bytes()
    use_huge_pages([*weights, others])
    assert num_huge_bytes() > before
    assert all((weight == index).all() for index, weight in enumerate(weights))


def test_where_there_are_none_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huge_pages, "_SIZE", tmp_path / "none")
    monkeypatch.setattr(huge_pages.ctypes, "CDLL", None)
    use_huge_pages([torch.ones(4096)])
