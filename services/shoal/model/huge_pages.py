"""Weights on huge pages: a step reads all of them, and where a page has 4 KiB, addresses are looked up for each.

Most systems give huge pages only to who asks (``transparent_hugepage/enabled`` says ``madvise``), and for memory that
isn't written yet. Weights are written one by one as they are read and packed, most of them smaller than a huge page:
they are moved once all are there (madvise(2), MADV_COLLAPSE).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage")
_COLLAPSE = 25
_GAP_BYTES = 64 << 10
"""What lies between two weights is the heap's, and may be moved, too."""


def use_huge_pages(tensors: Iterable[torch.Tensor]) -> None:
    """Move those that are on the CPU: two seconds a gigabyte. What the system doesn't move stays as it is (Linux before
    6.1, no room), and all of it where huge pages are switched off."""
    try:
        is_off = "[never]" in (_SYSTEM / "enabled").read_text(encoding="ascii")
        size = int((_SYSTEM / "hpage_pmd_size").read_text(encoding="ascii"))
        madvise = ctypes.CDLL(None).madvise
    except (OSError, ValueError, AttributeError):  # another system
        return
    if is_off:
        return
    held = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    for start, end in runs((one.data_ptr(), one.data_ptr() + one.nbytes()) for one in held):
        # One by one: a page that can't be moved would end the others' move.
        for page in range(-(-start // size) * size, end // size * size, size):
            madvise(ctypes.c_void_p(page), ctypes.c_size_t(size), _COLLAPSE)


def runs(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Addresses ``[start, end)``, in their order; what lies close together as one."""
    begun: tuple[int, int] | None = None
    for start, end in sorted(ranges):
        if begun is not None and start - begun[1] <= _GAP_BYTES:
            begun = begun[0], max(begun[1], end)
            continue
        if begun is not None:
            yield begun
        begun = start, end
    if begun is not None:
        yield begun
