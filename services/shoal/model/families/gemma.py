"""Gemma 2 and the text models of Gemma 3.

Both: norms multiply by ``1 + w`` in float32, four norms a layer, scaled embeddings, a sliding window on most layers.
Gemma 2 caps scores and logits; Gemma 3 norms queries and keys instead, and rotates windowed layers by another base.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shoal.errors import UnsupportedModel
from shoal.model.families.reading import FULL, SLIDING, plain, rope_table, typed_layers
from shoal.model.families.spec import ModelSpec, RopeTable


def gemma2(config: Any) -> ModelSpec:
    return replace(_gemma(config, rope_table(config)), layers=typed_layers(config))


def gemma3(config: Any) -> ModelSpec:
    # A model whose layers are all of one type has one table only.
    kinds = [kind for kind in (FULL, SLIDING) if kind in config.layer_types]
    layers = typed_layers(config, {kind: table for table, kind in enumerate(kinds)})
    tables = tuple(rope_table(config, kind) for kind in kinds)
    return replace(_gemma(config, tables[0]), layers=layers, rope_tables=tables, qk_norm=True)


def _gemma(config: Any, rope: RopeTable) -> ModelSpec:
    if config.use_bidirectional_attention:
        raise UnsupportedModel(f"a {config.model_type} model with bidirectional attention generates no text: not run")
    bias = bool(config.attention_bias)
    return replace(
        plain(config, rope, config.hidden_activation),
        qkv_bias=bias,
        out_bias=bias,
        post_norms=True,
        norm_offset=1.0,
        embedding_scale=config.hidden_size**0.5,
        attention_scale=config.query_pre_attn_scalar**-0.5,
        attention_softcap=config.attn_logit_softcapping,
        logit_softcap=config.final_logit_softcapping,
    )
