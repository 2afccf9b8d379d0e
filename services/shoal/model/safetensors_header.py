"""The header of a safetensors file (github.com/huggingface/safetensors, "Format").

::

    uint64 n | n bytes of JSON: {"name": {"dtype", "shape", "data_offsets": [begin, end]}, ...} | tensors
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from shoal.errors import MalformedWeights
from shoal.model.tensor_file import MAX_HEADER_BYTES, TensorFile, TensorInfo

_MAX_DIMENSIONS = 8
"""Real ones have four at most; the product of very many takes hours."""
# What a model that isn't quantized is stored in.
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def read_safetensors(path: Path) -> TensorFile:
    """Parse the header. Raises MalformedWeights that says what is wrong with which tensor."""
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, path.stat().st_size - 8):
            raise MalformedWeights(f"{path} is no safetensors file: its header would have {length} bytes")
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedWeights(f"{path}: the header is not JSON ({error}): copy the file again") from error
    if not isinstance(header, dict):
        raise MalformedWeights(f"{path}: the header is no JSON object: copy the file again")
    metadata = header.pop("__metadata__", {})
    start = 8 + length
    return TensorFile(path, metadata, {name: _info(path, name, row, start) for name, row in header.items()}, start)


def _info(path: Path, name: str, row: Any, start: int) -> TensorInfo:
    """Tensors of a dtype that isn't in the table get no size check here; reading one is refused."""
    try:
        dtype, shape, (begin, end) = row["dtype"], row["shape"], row["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise MalformedWeights(f"{path}: the header's entry for tensor {name} is damaged") from error
    if not (isinstance(shape, list) and all(map(_is_count, [*shape, begin, end])) and begin <= end):
        raise MalformedWeights(f"{path}: tensor {name} has no valid shape and place ({shape}, {begin} to {end})")
    if len(shape) > _MAX_DIMENSIONS:
        raise MalformedWeights(f"{path}: tensor {name} would have {len(shape)} dimensions")
    size = _DTYPE_BYTES.get(str(dtype))
    if size is not None and math.prod(shape) * size != end - begin:
        raise MalformedWeights(f"{path}: tensor {name} of shape {shape} in {dtype} can't fill {end - begin} bytes")
    return TensorInfo(name, str(dtype), tuple(shape), start + begin, end - begin)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63
