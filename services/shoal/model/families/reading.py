"""Reading what all families' configurations say in the same words, and refusing what the decoder doesn't run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.errors import UnsupportedModel
from shoal.model.families.spec import Activation, LayerSpec, ModelSpec, RopeTable

# RoPE variants whose frequencies don't depend on the length of the sequence at hand.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
FULL, SLIDING = "full_attention", "sliding_attention"


def plain(config: Any, rope: RopeTable, activation: str) -> ModelSpec:
    """The spec of a model without any of the switches: full attention and one RoPE table in all layers."""
    family = config.model_type
    if activation not in list(Activation):
        supported = ", ".join(map(repr, Activation))
        raise UnsupportedModel(f"a {family} model with activation {activation!r} is not supported, only {supported}")
    head_dim = head_dim_of(config)
    if config.num_key_value_heads < 1 or config.num_attention_heads % config.num_key_value_heads:
        raise UnsupportedModel(
            f"{config.num_attention_heads} heads can't share {config.num_key_value_heads} K/V heads evenly: the "
            "model's configuration is damaged"
        )
    return ModelSpec(
        family=family,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        norm_eps=config.rms_norm_eps,
        max_context_tokens=config.max_position_embeddings,
        layers=(LayerSpec(),) * config.num_hidden_layers,
        rope_tables=(rope,),
        attention_scale=head_dim**-0.5,
        activation=Activation(activation),
        tied_embeddings=bool(config.tie_word_embeddings),
    )


def head_dim_of(config: Any) -> int:
    return getattr(config, "head_dim", None) or int(config.hidden_size // config.num_attention_heads)


def rope_table(config: Any, layer_type: str | None = None) -> RopeTable:
    """The table that the family's own RoPE module in transformers builds (for ``layer_type`` of several).

    The module itself isn't asked: importing it takes half a second. Tests compare with it. Raises UnsupportedModel for
    a variant that the decoder would rotate wrongly.
    """
    import torch

    parameters = config.rope_parameters or {}
    parameters = parameters.get(layer_type, {}) if layer_type else parameters
    kind = parameters.get("rope_type", "default")
    if kind not in _ROPE_TYPES:
        raise UnsupportedModel(f"rope type {kind!r} is not supported; supported are: {', '.join(_ROPE_TYPES)}")
    if parameters.get("mrope_section"):
        raise UnsupportedModel("M-RoPE (mrope_section) is not supported: use a text model of the family")
    head_dim = head_dim_of(config)
    if kind == "default":
        # As transformers computes it, bit by bit: in float32.
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        inv_freq, scale = 1.0 / parameters["rope_theta"] ** exponents, 1.0
    else:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](config, **({"layer_type": layer_type} if layer_type else {}))
    if 2 * len(inv_freq) != head_dim:
        raise UnsupportedModel(f"RoPE on {2 * len(inv_freq)} of {head_dim} dimensions is not supported")
    return RopeTable(tuple(inv_freq.tolist()), float(scale))


def typed_layers(config: Any, ropes: Mapping[str, int] | None = None) -> tuple[LayerSpec, ...]:
    """One spec for each of the configuration's ``layer_types``; ``ropes`` says which RoPE table a type uses."""
    unknown = set(config.layer_types) - {FULL, SLIDING}
    if unknown:
        raise UnsupportedModel(
            f"layer types {', '.join(sorted(map(repr, unknown)))} are not supported; supported are: {FULL}, {SLIDING}"
        )
    kinds = {
        kind: LayerSpec(window_of(config) if kind == SLIDING else None, (ropes or {}).get(kind, 0))
        for kind in set(config.layer_types)
    }
    return tuple(kinds[kind] for kind in config.layer_types)


def window_of(config: Any) -> int:
    """The sliding window. Raises UnsupportedModel where there must be one and isn't."""
    window = config.sliding_window
    if not isinstance(window, int) or window < 1:
        raise UnsupportedModel(f"sliding_window is {window!r}, but the configuration has {SLIDING} layers: set it")
    return window
