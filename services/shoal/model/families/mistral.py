"""Mistral: Llama with a sliding window on all layers, or (``sliding_window: null``) on none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shoal.errors import UnsupportedModel
from shoal.model.families.reading import FULL, SLIDING, plain, rope_table, window_of
from shoal.model.families.spec import LayerSpec, ModelSpec


def mistral(config: Any) -> ModelSpec:
    spec = plain(config, rope_table(config), config.hidden_act)
    kind = FULL if config.sliding_window is None else SLIDING
    if set(getattr(config, "layer_types", None) or [kind]) != {kind}:
        # transformers' Mistral doesn't look at layer_types: such a model would be computed wrongly there, too.
        raise UnsupportedModel(f"a mistral model with other layer_types than {kind} is not supported")
    if kind == FULL:
        return spec
    return replace(spec, layers=(LayerSpec(window_of(config)),) * spec.num_layers)
