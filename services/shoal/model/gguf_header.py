"""The header of a GGUF file (github.com/ggml-org/ggml, docs/gguf.md), little-endian, version 2 or 3.

::

    "GGUF" | uint32 version | uint64 num_tensors | uint64 num_values
    num_values times (key, type, value) | num_tensors times (name, shape, type, offset) | padding | tensors

The gguf package's reader makes an array of every token (2.5 s for SmolLM2) and trusts each length; this one reads
what is there once (0.1 s) and believes no number that the file can't hold.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from shoal.errors import MalformedWeights, UnsupportedModel
from shoal.model.tensor_file import MAX_HEADER_BYTES, TensorFile, TensorInfo

_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_gguf(path: Path) -> TensorFile:
    """Parse the header. ``metadata`` values are numbers, strings, or lists of either.

    Raises MalformedWeights for what is damaged, UnsupportedModel for versions that aren't read.
    """
    with path.open("rb") as file:
        cursor = _Cursor(path, file)
        if cursor.take(4) != b"GGUF":
            raise MalformedWeights(f"{path} is no GGUF file: it doesn't begin with 'GGUF'")
        version = cursor.scalar("I")
        if version not in _VERSIONS:
            raise UnsupportedModel(f"{path} is GGUF version {version}; versions 2 and 3 (little-endian) are read")
        num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
        metadata = _collect(path, num_values, lambda: (cursor.string(), cursor.value(cursor.scalar("I"))))
        infos = _collect(path, num_tensors, cursor.tensor_info)
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0:
            raise MalformedWeights(f"{path}: general.alignment is {alignment!r}, it must be a positive integer")
        start = -(-cursor.position // alignment) * alignment
    return TensorFile(path, metadata, {name: _placed(path, name, row, start) for name, row in infos.items()}, start)


def _collect(path: Path, num_entries: int, read: Callable[[], tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for _ in range(num_entries):  # an absurd number ends at the end of the header
        name, value = read()
        if name in entries:
            raise MalformedWeights(f"{path}: the header names {name!r} twice: copy the file again")
        entries[name] = value
    return entries


def _placed(path: Path, name: str, row: tuple[tuple[int, ...], int, int], start: int) -> TensorInfo:
    shape, type_number, offset = row
    try:
        kind = GGMLQuantizationType(type_number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise MalformedWeights(f"{path}: tensor {name} has the unknown type {type_number}") from error
    if not shape or 0 in shape or shape[-1] % block:
        raise MalformedWeights(f"{path}: tensor {name} {shape} doesn't divide into {kind.name} blocks of {block}")
    return TensorInfo(name, kind.name, shape, start + offset, math.prod(shape) // block * block_bytes)


class _Cursor:
    """Reads values in order; raises MalformedWeights where the header would pass its end."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.position = 0
        self._path = path
        self._file = file
        self._end = min(path.stat().st_size, MAX_HEADER_BYTES)

    def take(self, num_bytes: int) -> bytes:
        self.position += num_bytes
        data = self._file.read(num_bytes) if self.position <= self._end else b""
        if len(data) != num_bytes:
            raise MalformedWeights(f"{self._path}: the header is truncated or damaged: copy the file again")
        return data

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        data = self.take(self.scalar("Q"))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise MalformedWeights(f"{self._path}: a string in the header is not UTF-8: copy the file again") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(self.scalar("I"), self.scalar("Q"))
        return self.scalar(self._code(kind))

    def tensor_info(self) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        """Name, and (shape, type, offset). GGUF writes the fastest dimension first, torch last."""
        name, num_dimensions = self.string(), self.scalar("I")
        if num_dimensions > _MAX_DIMENSIONS:
            raise MalformedWeights(f"{self._path}: tensor {name} would have {num_dimensions} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(num_dimensions))[::-1]
        return name, (shape, self.scalar("I"), self.scalar("Q"))

    def _array(self, kind: int, length: int) -> list[Any]:
        if kind == _STRING:
            return [self.string() for _ in range(length)]
        code = self._code(kind)
        width = struct.calcsize("<" + code)
        return [item for (item,) in struct.iter_unpack("<" + code, self.take(width * length))]

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise MalformedWeights(f"{self._path}: a value in the header has the unknown type {kind}")
        return _SCALARS[kind]
