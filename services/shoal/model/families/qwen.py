"""Qwen2 and 2.5 (Q, K and V have a bias) and Qwen3 (a norm on every head of Q and K instead)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shoal.model.families.reading import plain, rope_table, typed_layers
from shoal.model.families.spec import ModelSpec


def qwen2(config: Any) -> ModelSpec:
    spec = plain(config, rope_table(config), config.hidden_act)
    return replace(spec, layers=typed_layers(config), qkv_bias=True)


def qwen3(config: Any) -> ModelSpec:
    spec = plain(config, rope_table(config), config.hidden_act)
    bias = bool(config.attention_bias)
    return replace(spec, layers=typed_layers(config), qkv_bias=bias, out_bias=bias, qk_norm=True)
