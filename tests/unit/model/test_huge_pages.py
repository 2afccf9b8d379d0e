from __future__ import annotations

import ctypes
import mmap
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from memory_maps import mapping_of

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


def fresh_memory(num_bytes: int = 64 << 20) -> mmap.mmap:
    """Written, and so on pages of whatever size the system gives by itself."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE)
    memory.write(b"1" * num_bytes)
    return memory


def huge_bytes_at(address: int) -> int:
    """Of the mapping that holds ``address``."""
    found = re.search(r"AnonHugePages: *(\d+) kB", mapping_of(address))
    assert found is not None
    return int(found[1]) * KIB


def are_given() -> bool:
    """Whether the system moves any memory to huge pages."""
    try:
        is_off = "[never]" in (huge_pages._SYSTEM / "enabled").read_text()
        fresh_memory().madvise(huge_pages._COLLAPSE)
    except OSError:
        return False
    return not is_off


@pytest.mark.skipif(not are_given(), reason="this system gives no huge pages: Linux before 6.1, or without them")
def test_weights_are_moved_to_huge_pages_and_stay_what_they_are() -> None:
    weights = torch.frombuffer(fresh_memory(), dtype=torch.uint8)
    use_huge_pages([weights, torch.ones(3, device="meta")])
    assert huge_bytes_at(weights.data_ptr() + weights.nbytes // 2) >= weights.nbytes // 2
    assert (weights == ord("1")).all()


@pytest.mark.parametrize("told", [None, "always madvise [never]"], ids=["another system", "switched off"])
def test_where_there_are_none_nothing_is_moved(
    told: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if told is not None:
        (tmp_path / "enabled").write_text(told)
        (tmp_path / "hpage_pmd_size").write_text(f"{2 << 20}")
    asked: list[object] = []
    madvise = SimpleNamespace(madvise=lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(huge_pages, "_SYSTEM", tmp_path)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: madvise)
    weights = torch.ones(2 << 20)
    use_huge_pages([weights])
    assert not asked
    (tmp_path / "enabled").write_text("[always] madvise never")
    (tmp_path / "hpage_pmd_size").write_text(f"{2 << 20}")
    use_huge_pages([weights])
    assert len(asked) >= 3
