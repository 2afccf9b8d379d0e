"""How llama.cpp writes a text model of Gemma 3.

Its converter adds the 1 of ``1 + w`` to every norm weight; ``restore`` takes it off again. What all Gemma 3 models
share (which layers have windows, their RoPE base) isn't in the file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shoal.model.families.reading import FULL, SLIDING
from shoal.model.gguf_llama import LAYER_NAMES as _LLAMA_NAMES
from shoal.model.gguf_values import GgufValues

if TYPE_CHECKING:
    import torch
    from transformers import Gemma3TextConfig

LAYER_NAMES = {
    **_LLAMA_NAMES,
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_NUM_LAYERS_27B = 62


def gemma3_config(values: GgufValues) -> Gemma3TextConfig:
    """The configuration that the metadata describe."""
    from transformers import Gemma3TextConfig

    common = values.common()
    # Only the 27B model scales its scores otherwise than by the head size, and the file doesn't say so.
    is_27b = common["num_hidden_layers"] == _NUM_LAYERS_27B
    per_head = common["hidden_size"] // common["num_attention_heads"]
    local = values.number("rope.freq_base_swa", 10_000.0)
    return Gemma3TextConfig(
        **common,
        query_pre_attn_scalar=per_head if is_27b else common["head_dim"],
        sliding_window=values.count("attention.sliding_window"),
        rope_parameters={FULL: values.rope(), SLIDING: {"rope_type": "default", "rope_theta": local}},
        final_logit_softcapping=values.number("final_logit_softcapping") if _has_cap(values) else None,
    )


def restore(_config: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A norm's weight as transformers stores it; other tensors are the same."""
    return tensor - 1 if name.endswith("norm.weight") else tensor


def _has_cap(values: GgufValues) -> bool:
    return "gemma3.final_logit_softcapping" in values.file.metadata
