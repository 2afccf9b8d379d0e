"""A model's weights, one tensor at a time, by their transformers name whatever the file format.

At no time is more than one tensor in memory: a loader that drops or casts each one as it comes needs no room for the
whole model twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import torch
from gguf import GGMLQuantizationType, dequantize

from shoal.errors import MalformedWeights
from shoal.model.files import ModelFiles, ModelKind
from shoal.model.gguf_model import gguf_architecture, gguf_outline
from shoal.model.tensor_file import Bytes, TensorFile, TensorInfo

_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Sixteen times as many float32 values, and what is made on the way to them, fit the second-level cache.
_PIECE_VALUES = 1 << 13

# Turns the raw bytes of a tensor, called by its transformers name, into the tensor.
_Decode = Callable[[str, TensorInfo, Bytes], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Place:
    file: TensorFile
    handle: BinaryIO
    info: TensorInfo


class WeightReader:
    """Reads tensors while ``open_weights`` holds their files open.

    Names are transformers' (``model.layers.3.self_attn.q_proj.weight``); ``lm_head.weight`` is absent where a GGUF
    ties it to the embedding.
    """

    def __init__(self, places: Mapping[str, _Place], decode: _Decode) -> None:
        self._places = places
        self._decode = decode

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._place(name).info.shape

    def num_bytes(self, name: str) -> int:
        """Bytes that the tensor takes in the file."""
        return self._place(name).info.num_bytes

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU, in memory of its own: float32 from GGUF, else in the dtype of the file.

        Raises MalformedWeights if there is no such tensor, the file ends inside it, or its type can't be read.
        """
        place = self._place(name)
        return self._decode(name, place.info, place.file.read(place.handle, place.info))

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            raise MalformedWeights(f"tensor {name} is missing: the weights don't belong to this configuration")
        return self._places[name]


@contextmanager
def open_weights(files: ModelFiles) -> Iterator[WeightReader]:
    """Hold a model's weight files open for reading. Raises ModelError."""
    is_gguf = files.kind is ModelKind.GGUF
    places: dict[str, _Place] = {}
    with ExitStack() as stack:
        for file in files.tensor_files:
            handle = stack.enter_context(file.path.open("rb"))
            for info in file.tensors.values():
                name = gguf_architecture(file).transformers_name(info.name) if is_gguf else info.name
                if name in places:
                    raise MalformedWeights(f"{files.path} holds tensor {name} twice")
                places[name] = _Place(file, handle, info)
        yield WeightReader(places, _gguf_decoder(files) if is_gguf else _from_safetensors)


def _from_safetensors(name: str, info: TensorInfo, data: Bytes) -> torch.Tensor:
    dtype = _SAFETENSORS_DTYPES.get(info.dtype)
    if dtype is None:
        known = ", ".join(_SAFETENSORS_DTYPES)
        raise MalformedWeights(f"tensor {name} is stored as {info.dtype}; weights must be one of {known}")
    return torch.from_numpy(data).view(dtype).reshape(info.shape)


def _num_pieces(shape: tuple[int, ...]) -> int:
    """In how many, of whole rows each, gguf is to read a tensor of ``shape``. It takes 16 at a time, whatever is in
    them: of a small model's rows so little that it spends most of the time between them."""
    num_rows, most = math.prod(shape[:-1]), max(1, _PIECE_VALUES // shape[-1])
    return num_rows // next(each for each in range(most, 0, -1) if num_rows % each == 0)


def _gguf_decoder(files: ModelFiles) -> _Decode:
    outline = gguf_outline(files.tensor_files[0])
    architecture = gguf_architecture(files.tensor_files[0])

    def decode(name: str, info: TensorInfo, data: Bytes) -> torch.Tensor:
        try:
            values = dequantize(data.reshape(_num_pieces(info.shape), -1), GGMLQuantizationType[info.dtype])
        except NotImplementedError as error:
            raise MalformedWeights(f"tensor {name} is stored as {info.dtype}, which can't be read") from error
        return architecture.restore(outline, name, torch.from_numpy(values).reshape(info.shape))

    return decode
