"""How llama.cpp writes a model of the Llama family: its configuration and its tensors' names.

Rows of the Q and K projections are permuted in GGUF, because llama.cpp rotates neighbours (0, 1), (2, 3), ... where
transformers rotates halves (0, d/2), (1, d/2 + 1), ...; ``unpermute`` gives transformers' order back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from shoal.errors import MalformedWeights, UnsupportedModel
from shoal.model.tensor_file import TensorFile

if TYPE_CHECKING:
    from transformers import LlamaConfig

ARCHITECTURE = "llama"

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_BIASES = {"attention": ("attn_q", "attn_k", "attn_v", "attn_output"), "mlp": ("ffn_gate", "ffn_up", "ffn_down")}


def transformers_name(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``.

    Raises UnsupportedModel for a tensor that a plain Llama doesn't have: the decoder would leave it out.
    """
    stem, _, part = name.rpartition(".")
    if stem in _NAMES and part == "weight":
        return f"{_NAMES[stem]}.weight"
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise UnsupportedModel(f"the GGUF's tensor {name} is not part of a plain Llama model; use a safetensors folder")
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def unpermute(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows ``[heads * head_dim, ...]`` of a Q or K projection (or its bias) in transformers' order."""
    pairs = tensor.reshape(num_heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def llama_config(file: TensorFile) -> LlamaConfig:
    """The configuration that the GGUF's metadata describe.

    Raises UnsupportedModel where it isn't a plain Llama, MalformedWeights where a value is missing or impossible.
    """
    from transformers import LlamaConfig

    values = _Values(file)
    values.refuse_variants()
    hidden, heads = values.count("embedding_length"), values.count("attention.head_count")
    kv_heads = values.count("attention.head_count_kv", heads)
    head_dim = values.count("attention.key_length", values.count("rope.dimension_count", max(1, hidden // heads)))
    if heads % kv_heads or hidden % heads or head_dim % 2:
        raise MalformedWeights(
            f"{file.path}: {heads} heads, {kv_heads} KV heads of width {head_dim}, hidden size {hidden}: impossible"
        )
    for key in ("rope.dimension_count", "attention.value_length"):
        if values.count(key, head_dim) != head_dim:
            raise UnsupportedModel(f"{file.path}: llama.{key} differs from the head size {head_dim}: not supported")
    return LlamaConfig(
        vocab_size=values.vocab_size(),
        hidden_size=hidden,
        intermediate_size=values.count("feed_forward_length"),
        num_hidden_layers=values.count("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=values.count("context_length"),
        rms_norm_eps=values.number("attention.layer_norm_rms_epsilon"),
        rope_parameters=values.rope(),
        attention_bias=values.has_biases("attention"),
        mlp_bias=values.has_biases("mlp"),
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=values.token_id("bos"),
        eos_token_id=values.token_id("eos"),
        pad_token_id=values.token_id("padding"),
        dtype="float32",
    )


class _Values:
    """Looks up ``llama.*`` metadata, checked."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        self._metadata: Mapping[str, Any] = file.metadata

    def refuse_variants(self) -> None:
        architecture = self._metadata.get("general.architecture")
        if architecture != ARCHITECTURE:
            raise UnsupportedModel(
                f"{self._file.path} holds a model of architecture {architecture!r}; of GGUF files only "
                f"{ARCHITECTURE!r} is supported, for other families give a folder with safetensors"
            )
        if self._metadata.get("llama.expert_count"):
            raise UnsupportedModel(f"{self._file.path} is a mixture of experts; only dense Llama models are supported")
        if self._metadata.get("split.count", 1) not in (0, 1):
            raise UnsupportedModel(f"{self._file.path} is one part of several: join them with llama-gguf-split --merge")

    def count(self, key: str, default: int | None = None) -> int:
        value = self._metadata.get(f"llama.{key}", default)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise MalformedWeights(f"{self._file.path}: llama.{key} is {value!r}, it must be a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._metadata.get(f"llama.{key}", default)
        if type(value) is not float or not 0 < value < float("inf"):
            raise MalformedWeights(f"{self._file.path}: llama.{key} is {value!r}, it must be a positive number")
        return value

    def vocab_size(self) -> int:
        """What the embedding has; a padded vocabulary has more rows than tokens."""
        embedding = self._file.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise MalformedWeights(f"{self._file.path}: the embedding token_embd.weight is missing or no matrix")
        return embedding.shape[0]

    def rope(self) -> dict[str, Any]:
        """Linear scaling or none: ``rope_freqs`` (Llama 3.1) doesn't tell which parameters it was made from."""
        scaling = self._metadata.get("llama.rope.scaling.type", "none")
        if "rope_freqs.weight" in self._file.tensors or scaling not in ("none", "linear"):
            raise UnsupportedModel(
                f"{self._file.path}: its RoPE scaling is not read from GGUF; use a safetensors folder"
            )
        theta = self.number("rope.freq_base", 10_000.0)
        if scaling == "none":
            return {"rope_type": "default", "rope_theta": theta}
        return {"rope_type": "linear", "rope_theta": theta, "factor": self.number("rope.scaling.factor")}

    def has_biases(self, group: str) -> bool:
        """All or none of a group's projections have one, in transformers' Llama."""
        present = {f"blk.0.{part}.bias" in self._file.tensors for part in _BIASES[group]}
        if len(present) > 1:
            raise UnsupportedModel(f"{self._file.path}: only some {group} projections have a bias: not supported")
        return present.pop()

    def token_id(self, which: str) -> int | None:
        value = self._metadata.get(f"tokenizer.ggml.{which}_token_id")
        if value is not None and (type(value) is not int or value >= self.vocab_size()):
            raise MalformedWeights(f"{self._file.path}: tokenizer.ggml.{which}_token_id is {value!r}, no token's id")
        return value
