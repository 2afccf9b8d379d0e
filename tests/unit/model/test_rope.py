"""Frequencies are made once for each device, and whoever asks first, all can use them."""

from __future__ import annotations

import torch

from models import tiny_model
from shoal.model.families import describe
from shoal.model.rope import Rope, _inv_freq


def test_what_was_first_asked_for_in_inference_can_be_differentiated_through():
    spec = describe(tiny_model("gemma3_text", torch.float32, layers=3).config)
    _inv_freq.cache_clear()
    with torch.inference_mode():
        Rope.at(spec, torch.arange(4), torch.float32)
    assert _inv_freq.cache_info().currsize == len(spec.rope_tables) == 2
    rope = Rope.at(spec, torch.arange(4), torch.float32)
    assert _inv_freq.cache_info().hits == 2 and not rope.cos[0].is_inference()
    heads = torch.ones(4, 2, spec.head_dim, requires_grad=True)
    turned = heads.clone()
    rope.rotate_(turned, 1)
    turned.sum().backward()
    assert heads.grad is not None and heads.grad.isfinite().all()
