"""The architectures that are read from GGUF files: their tensors' names, their configuration, what to undo."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shoal.errors import UnsupportedModel
from shoal.model import gguf_gemma3, gguf_llama
from shoal.model.gguf_values import GgufValues
from shoal.model.tensor_file import TensorFile

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    """``restore(outline, name, tensor)`` undoes what llama.cpp's converter did to a tensor of transformers' ``name``.
    ``outline`` has at least what ``restore`` and ``families.describe`` read of ``config``."""

    layer_names: Mapping[str, str]
    config: Callable[[GgufValues], PreTrainedConfig]
    outline: Callable[[GgufValues], Any]
    restore: Callable[[Any, str, torch.Tensor], torch.Tensor]

    def transformers_name(self, name: str) -> str:
        """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``.

        Raises UnsupportedModel for a tensor that the family doesn't have: the decoder would leave it out.
        """
        stem, _, part = name.rpartition(".")
        if stem in _NAMES and part == "weight":
            return f"{_NAMES[stem]}.weight"
        match = _LAYER.fullmatch(name)
        if match is None or match[2] not in self.layer_names:
            raise UnsupportedModel(
                f"the GGUF's tensor {name} is not part of a plain model of its family; use a safetensors folder"
            )
        return f"model.layers.{match[1]}.{self.layer_names[match[2]]}.{match[3]}"


_ARCHITECTURES = {
    "gemma3": GgufArchitecture(
        gguf_gemma3.LAYER_NAMES, gguf_gemma3.gemma3_config, gguf_gemma3.gemma3_config, gguf_gemma3.restore
    ),
    "llama": GgufArchitecture(
        gguf_llama.LAYER_NAMES, gguf_llama.llama_config, gguf_llama.llama_outline, gguf_llama.restore
    ),
}


def gguf_architecture(file: TensorFile) -> GgufArchitecture:
    """By ``general.architecture``. Raises UnsupportedModel that names what is supported."""
    architecture = file.metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise UnsupportedModel(
            f"{file.path} holds a model of architecture {architecture!r}; of GGUF files only "
            f"{' and '.join(map(repr, _ARCHITECTURES))} are supported; for other families give a safetensors folder"
        )
    return _ARCHITECTURES[architecture]


def gguf_size(file: TensorFile) -> tuple[int, int]:
    """The vocabulary's and the longest context's tokens. Raises as ``gguf_config`` does."""
    gguf_architecture(file)
    values = _plain_values(file)
    return values.vocab_size(), values.count("context_length")


def gguf_config(file: TensorFile) -> PreTrainedConfig:
    """The configuration that the metadata describe.

    Raises UnsupportedModel where it isn't a plain model of the family, MalformedWeights where a value is missing or
    impossible.
    """
    return gguf_architecture(file).config(_plain_values(file))


def gguf_outline(file: TensorFile) -> Any:
    """What ``families.describe`` reads of the same, without transformers' configurations where that can be told."""
    return gguf_architecture(file).outline(_plain_values(file))


def gguf_end_token_ids(file: TensorFile) -> list[int]:
    """The tokens that end an answer, in no order; none where the file names none. Raises as ``gguf_config`` does."""
    gguf_architecture(file)
    return _plain_values(file).end_token_ids()


def _plain_values(file: TensorFile) -> GgufValues:
    values = GgufValues(file)
    values.refuse_variants()
    return values
