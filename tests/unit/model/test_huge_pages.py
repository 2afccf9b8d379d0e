from __future__ import annotations

import mmap
import re

import pytest
import torch
from memory_maps import mapping_of

from shoal.model import huge_pages
from shoal.model.huge_pages import use_huge_pages

KIB = 1 << 10


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
