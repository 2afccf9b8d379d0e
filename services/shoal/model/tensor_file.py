"""What is known of a weight file once its header was read: where each tensor lies.

Both formats come to the same: a header, then raw tensors. Only the header is parsed; tensors are read one by one with
plain reads, so that a file that ends early is an error with a name, not a fault in mapped memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from shoal.errors import MalformedWeights

Bytes = npt.NDArray[np.uint8]

# More than any real header: 262,144 tokens with their merges and scores take about 16 MiB.
MAX_HEADER_BYTES = 256 << 20
_SAMPLE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: ``dtype`` as the format calls it, ``shape`` in torch's order, ``offset`` from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A parsed header. ``metadata`` is the format's own; ``data_start`` is where tensors begin, in bytes."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    data_start: int

    def __post_init__(self) -> None:
        size = self.path.stat().st_size
        for info in self.tensors.values():
            if info.offset < self.data_start or info.offset + info.num_bytes > size:
                raise MalformedWeights(
                    f"{self.path}: tensor {info.name} lies at bytes {info.offset} to {info.offset + info.num_bytes} "
                    f"of a file of {size}: the file is truncated or damaged; copy it again"
                )

    def read(self, file: BinaryIO, info: TensorInfo) -> Bytes:
        """The tensor's ``num_bytes`` raw bytes, from this file opened for binary reading."""
        data = np.empty(info.num_bytes, dtype=np.uint8)
        file.seek(info.offset)
        if file.readinto(data.data) != info.num_bytes:  # type: ignore[attr-defined]
            raise MalformedWeights(f"{self.path} ends inside tensor {info.name}: copy the file again")
        return data

    def digest(self) -> bytes:
        """SHA-256 of the header and of both ends of every tensor: quick for any size, equal for equal files."""
        sha = hashlib.sha256()
        with self.path.open("rb") as file:
            for offset, length in self._samples():
                file.seek(offset)
                sha.update(file.read(length))
        return sha.digest()

    def _samples(self) -> Iterator[tuple[int, int]]:
        yield 0, self.data_start
        for info in self.tensors.values():
            if info.num_bytes <= 2 * _SAMPLE_BYTES:
                yield info.offset, info.num_bytes
            else:
                yield info.offset, _SAMPLE_BYTES
                yield info.offset + info.num_bytes - _SAMPLE_BYTES, _SAMPLE_BYTES
