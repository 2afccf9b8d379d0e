"""Llama 2 and 3.x, and what is built like them (SmolLM2)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shoal.model.families.reading import plain, rope_table
from shoal.model.families.spec import ModelSpec


def llama(config: Any) -> ModelSpec:
    bias = bool(config.attention_bias)
    return replace(
        plain(config, rope_table(config), config.hidden_act),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(config.mlp_bias),
    )
