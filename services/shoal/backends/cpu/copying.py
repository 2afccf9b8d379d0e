"""Bytes from one place to others, or from many to one, and their CRC32C (RFC 3720), in one pass over the memory.

By Shoal's own kernel where there is one; else by numpy and google-crc32c in turns, in pieces that stay in the cache
between the two. Either way the checksum is of what was written, whatever happens to the source meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from shoal.backends.cpu.kernels import NativeKernels

Bytes = npt.NDArray[np.uint8]

_PIECE_BYTES = 256 << 10
_LINE_BYTES = 64
"""The kernel takes whole ones: K/V of one token in one layer are, in any model that isn't a toy."""


class Copier:
    """Copies on the calling thread alone; while the kernel does, others run Python."""

    def __init__(self, kernels: NativeKernels | None = None) -> None:
        self._kernels = kernels

    def has_kernel_for(self, row_bytes: int) -> bool:
        """Rows of so many bytes are copied by Shoal's own kernel, as fast as memory is."""
        return self._kernels is not None and row_bytes % _LINE_BYTES == 0

    def copy(self, source: bytes | memoryview, target: Bytes) -> int:
        """All of ``source`` into ``target``, of as many bytes."""
        given = np.frombuffer(source, np.uint8)
        if given.shape != target.shape:
            raise ValueError(f"{len(given)} bytes don't fit into {len(target)}")
        if self._kernels is None or len(given) % _LINE_BYTES:
            return _copy(given, target)
        return self._kernels.copy_rows(given, len(given) // _LINE_BYTES, _LINE_BYTES, (target,))

    def gather(self, sources: Sequence[Bytes], at: npt.NDArray[np.int64], target: Bytes) -> int:
        """The rows ``at`` ``[rows]`` of each of ``sources`` ``[any, row_bytes]``, one after the other, into ``target``.

        Raises IndexError as ``scatter``.
        """
        row_bytes = sources[0].shape[1]
        _require_fitting(target.size, sources, at)
        if self._kernels is not None and self.has_kernel_for(row_bytes):
            return self._kernels.gather_rows(sources, at, target)
        crc = 0
        for source, rows in zip(sources, target.reshape(len(sources), len(at), row_bytes), strict=True):
            crc = _gather(source, at, rows, crc)
        return crc

    def scatter(self, source: bytes | memoryview, targets: Sequence[Bytes], at: npt.NDArray[np.int64]) -> int:
        """``source`` ``[targets, rows, row_bytes]`` into the rows ``at`` ``[rows]`` of each ``[any, row_bytes]``.

        Raises IndexError where a row isn't there: -1 isn't the last one here.
        """
        given = np.frombuffer(source, np.uint8)
        row_bytes = targets[0].shape[1]
        _require_fitting(given.size, targets, at)
        if self._kernels is not None and self.has_kernel_for(row_bytes):
            return self._kernels.copy_rows(given, len(at), row_bytes, targets, at)
        crc = 0
        for target, rows in zip(targets, given.reshape(len(targets), len(at), row_bytes), strict=True):
            crc = _scatter(rows, target, at, crc)
        return crc


def _require_fitting(num_bytes: int, held: Sequence[Bytes], at: npt.NDArray[np.int64]) -> None:
    row_bytes, num_rows = held[0].shape[1], min(map(len, held))
    if num_bytes != len(held) * len(at) * row_bytes:
        raise ValueError(f"{num_bytes} bytes aren't {len(at)} rows of {row_bytes} for each of {len(held)}")
    if at.size and not (at.min() >= 0 and at.max() < num_rows):
        raise IndexError(f"rows {at.min()} to {at.max()} of {num_rows}")


def _copy(source: Bytes, target: Bytes) -> int:
    crc = 0
    for start in range(0, len(source), _PIECE_BYTES):
        piece = target[start : start + _PIECE_BYTES]
        piece[:] = source[start : start + _PIECE_BYTES]
        crc = google_crc32c.extend(crc, piece)
    return crc


def _gather(source: Bytes, at: npt.NDArray[np.int64], target: Bytes, crc: int) -> int:
    step = max(1, _PIECE_BYTES // source.shape[1])
    for start in range(0, len(at), step):
        piece = target[start : start + step]
        # Its bounds are checked: ``clip`` spares numpy a copy, without which it couldn't raise.
        np.take(source, at[start : start + step], axis=0, out=piece, mode="clip")
        crc = google_crc32c.extend(crc, piece.reshape(-1))
    return crc


def _scatter(source: Bytes, target: Bytes, at: npt.NDArray[np.int64], crc: int) -> int:
    row_bytes = target.shape[1]
    step = max(1, _PIECE_BYTES // row_bytes)
    rows = np.empty((min(step, len(at)), row_bytes), np.uint8)  # nobody else's memory: what is checked stays as it is
    # A row is one value: numpy would go byte by byte.
    held = target.view(np.dtype((np.void, row_bytes))).reshape(-1)
    for start in range(0, len(at), step):
        piece = rows[: min(step, len(at) - start)]
        piece[:] = source[start : start + step]
        crc = google_crc32c.extend(crc, piece.reshape(-1))
        held[at[start : start + step]] = piece.view(held.dtype).reshape(-1)
    return crc
