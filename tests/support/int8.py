"""Models whose matrices, and what these multiply, are what int8 leaves of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from reference import Cache, all_layers, encode_shallow, logits_of, run_layers

from shoal.model.int8 import Int8Matrix


def dequantized(model: Any) -> Any:
    """A copy of a transformers model with each matrix that is multiplied as int8 has it, and its inputs. Rows are
    rounded each by itself, so it doesn't matter how they are fused."""
    other = copy.deepcopy(model)
    looked_up = None if model.config.tie_word_embeddings else other.model.embed_tokens.weight
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if parameter.dim() == 2 and parameter is not looked_up:
                parameter.copy_(whole(Int8Matrix.of(parameter.detach(), name)))
    for module in other.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (_in_steps(inputs[0]),))
    return other


def whole(matrix: Int8Matrix) -> torch.Tensor:
    """``[outputs, inputs]``, in the matrix' dtype."""
    return matrix.rows(torch.arange(matrix.num_outputs))


def _in_steps(inputs: torch.Tensor) -> torch.Tensor:
    """Each 64 of a row in steps of a 127th of the largest."""
    rounded = []
    for block in inputs.split(64, dim=-1):
        step = block.abs().amax(dim=-1, keepdim=True) / 127
        rounded.append(torch.where(step > 0, (block / step).round() * step, 0.0))
    return torch.cat(rounded, dim=-1)


def with_deep_layers_of(model: Any, other: Any, num_skipped: int) -> Any:
    """A copy of ``model`` whose last layers are ``other``'s."""
    mixed = copy.deepcopy(model)
    for index in all_layers(model)[len(model.model.layers) - num_skipped :]:
        mixed.model.layers[index] = other.model.layers[index]
    return mixed


@torch.no_grad()
def shallow_logits(prefill: Any, decode: Any, ids: Sequence[int], num_prompt: int, num_skipped: int) -> torch.Tensor:
    """``[len(ids) - N + 1, vocab]`` after each of the tokens ``N-1..``: the shallow tokens by ``prefill``, all others
    by ``decode``, on the K/V of the former."""
    cache: Cache = {}
    encode_shallow(prefill, ids[: num_prompt - 1], num_skipped, cache)
    states = run_layers(decode, ids[num_prompt - 1 :], num_prompt - 1, all_layers(decode), cache)
    return logits_of(decode, states)
