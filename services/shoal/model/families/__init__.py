"""The model families that the decoder runs: one row each.

``describe`` turns a transformers configuration into a ``ModelSpec``, all that the decoder, the projection and the
loader know about a model. A new family is one small file beside this one and a row here; where it computes something
new, also a switch of the spec (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shoal.errors import UnsupportedModel
from shoal.model.families.gemma import gemma2, gemma3
from shoal.model.families.llama import llama
from shoal.model.families.mistral import mistral
from shoal.model.families.qwen import qwen2, qwen3
from shoal.model.families.spec import Activation, LayerSpec, ModelSpec, RopeTable

__all__ = ["FAMILIES", "Activation", "LayerSpec", "ModelSpec", "RopeTable", "check_family", "describe"]

# transformers' model_type -> how its configuration is read
FAMILIES: dict[str, Callable[[Any], ModelSpec]] = {
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
}


def describe(config: Any) -> ModelSpec:
    """The spec of a transformers configuration. Raises UnsupportedModel that names what is supported."""
    family = getattr(config, "model_type", "")
    check_family(family)
    return FAMILIES[family](config)


def check_family(family: Any) -> None:
    """Raises UnsupportedModel that names what is supported, unless transformers' model type ``family`` is."""
    if not isinstance(family, str) or family not in FAMILIES:
        raise UnsupportedModel(f"model type {family!r} is not supported; supported are: {', '.join(FAMILIES)}")
