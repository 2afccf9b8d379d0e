"""What the decoder, the projection and the loader know about a model."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Activation(enum.StrEnum):
    """Of the gated MLP, by transformers' name."""

    SILU = "silu"
    GELU_TANH = "gelu_pytorch_tanh"


@dataclass(frozen=True, slots=True)
class RopeTable:
    """``head_dim / 2`` RoPE frequencies (radians a token), and what cosines and sines are multiplied with."""

    inv_freq: tuple[float, ...]
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """How one layer looks at positions: at its own and the ``window - 1`` before it (``None``: at all before it),
    rotated by the model's RoPE table number ``rope``."""

    window: int | None = None
    rope: int = 0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shapes and switches of one model.

    ``norm_offset`` is added to the weight of every norm, which then stays in float32 (Gemma). ``qk_norm``: queries and
    keys are normed, head by head, before RoPE. ``post_norms``: what attention and MLP return is normed before it's
    added. Attention scores are scaled by ``attention_scale``; a softcap ``c`` turns ``x`` into ``c tanh(x / c)``.
    """

    family: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    max_context_tokens: int
    layers: tuple[LayerSpec, ...]
    rope_tables: tuple[RopeTable, ...]
    attention_scale: float
    activation: Activation = Activation.SILU
    tied_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def windows(self) -> frozenset[int]:
        """The different windows of its layers; empty where every layer sees everything."""
        return frozenset(layer.window for layer in self.layers if layer.window is not None)

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
        attention += (self.q_size + 2 * self.kv_size) * self.qkv_bias + hidden * self.out_bias
        mlp = 3 * hidden * inner + (2 * inner + hidden) * self.mlp_bias
        norms = 2 * hidden * (1 + self.post_norms) + 2 * self.head_dim * self.qk_norm
        embeddings = self.vocab_size * hidden * (1 if self.tied_embeddings else 2)
        return self.num_layers * (attention + mlp + norms) + hidden + embeddings
