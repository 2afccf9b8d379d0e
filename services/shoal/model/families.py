"""What a model family's configuration means to the decoder: one row a family.

``describe`` turns a transformers configuration into a ``ModelSpec``, all that the decoder, the projection and the
loader know about a model. A new family is a new row, and, where it computes something new, a field of the spec.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shoal.errors import UnsupportedModel

# RoPE variants whose frequencies don't depend on the length of the sequence at hand.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shapes and switches of one model. ``inv_freq`` has ``head_dim / 2`` RoPE frequencies (radians a token)."""

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    max_context_tokens: int
    inv_freq: tuple[float, ...]
    rope_scale: float = 1.0
    tied_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of K (or V) of one token."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Of the whole model: what a prefill replica's share is measured against."""
        hidden, inner = self.hidden_size, self.intermediate_size
        attention = hidden * (2 * self.q_size + 2 * self.kv_size)
        attention += (self.q_size + 2 * self.kv_size + hidden) * self.attention_bias
        mlp = 3 * hidden * inner + (2 * inner + hidden) * self.mlp_bias
        embeddings = self.vocab_size * hidden * (1 if self.tied_embeddings else 2)
        return self.num_layers * (attention + mlp + 2 * hidden) + hidden + embeddings


def describe(config: Any) -> ModelSpec:
    """The spec of a transformers configuration. Raises UnsupportedModel that names what is supported."""
    family = getattr(config, "model_type", None)
    row = _FAMILIES.get(str(family))
    if row is None:
        raise UnsupportedModel(f"model type {family!r} is not supported; supported are: {', '.join(sorted(_FAMILIES))}")
    return row(config)


def _llama(config: Any) -> ModelSpec:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    if config.hidden_act != "silu":
        raise UnsupportedModel(f"a llama model with activation {config.hidden_act!r} is not supported, only 'silu'")
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        raise UnsupportedModel(f"rope type {rope_type!r} is not supported; supported are: {', '.join(_ROPE_TYPES)}")
    rope = LlamaRotaryEmbedding(config=config)
    return ModelSpec(
        family="llama",
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        norm_eps=config.rms_norm_eps,
        max_context_tokens=config.max_position_embeddings,
        inv_freq=tuple(rope.inv_freq.tolist()),
        rope_scale=float(rope.attention_scaling),
        tied_embeddings=bool(config.tie_word_embeddings),
        attention_bias=bool(config.attention_bias),
        mlp_bias=bool(config.mlp_bias),
    )


_FAMILIES: dict[str, Callable[[Any], ModelSpec]] = {"llama": _llama}
