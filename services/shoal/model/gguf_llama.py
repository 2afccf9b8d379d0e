"""How llama.cpp writes a model of the Llama family.

Rows of the Q and K projections are permuted in GGUF, because llama.cpp rotates neighbours (0, 1), (2, 3), ... where
transformers rotates halves (0, d/2), (1, d/2 + 1), ...; ``restore`` gives transformers' order back.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from shoal.errors import MalformedWeights, UnsupportedModel
from shoal.model.gguf_values import GgufValues

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig

LAYER_NAMES = {
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
_BIASES = {"attention": ("attn_q", "attn_k", "attn_v", "attn_output"), "mlp": ("ffn_gate", "ffn_up", "ffn_down")}


def llama_config(values: GgufValues) -> LlamaConfig:
    """The configuration that the metadata describe."""
    from transformers import LlamaConfig

    return LlamaConfig(**_settings(values))


def llama_outline(values: GgufValues) -> Any:
    """The same, for whoever only reads it: transformers' class takes two seconds to import."""
    if values.rope()["rope_type"] != "default":
        return llama_config(values)  # transformers computes other frequencies by it
    return SimpleNamespace(model_type="llama", hidden_act="silu", **_settings(values))


def _settings(values: GgufValues) -> dict[str, Any]:
    return {
        **values.common(),
        "rope_parameters": values.rope(),
        "attention_bias": _has_biases(values, "attention"),
        "mlp_bias": _has_biases(values, "mlp"),
    }


def restore(config: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Rows ``[heads * head_dim, ...]`` of a Q or K projection (or its bias) in transformers' order."""
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    num_heads = next((number for part, number in heads.items() if part in name), None)
    if num_heads is None:
        return tensor
    if tensor.shape[0] % (2 * num_heads):
        raise MalformedWeights(f"tensor {name} has {tensor.shape[0]} rows, which {num_heads} heads can't share")
    pairs = tensor.reshape(num_heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _has_biases(values: GgufValues, group: str) -> bool:
    """All or none of a group's projections have one, in transformers' Llama."""
    present = {f"blk.0.{part}.bias" in values.file.tensors for part in _BIASES[group]}
    if len(present) > 1:
        raise UnsupportedModel(f"{values.file.path}: only some {group} projections have a bias: not supported")
    return present.pop()
