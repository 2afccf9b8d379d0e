"""Frequencies are made once for each device, and angles looked up: whoever asks first, all can use them."""

from __future__ import annotations

import pytest
import torch
from models import tiny_model

from shoal.model import rope as module
from shoal.model.families import describe
from shoal.model.rope import Rope, _inv_freq


def test_what_was_first_asked_for_in_inference_can_be_differentiated_through():
    spec = describe(tiny_model("gemma3_text", torch.float32, layers=3).config)
    _inv_freq.cache_clear()
    module._tables.clear()
    with torch.inference_mode():
        Rope.at(spec, torch.arange(4), torch.float32)
    assert _inv_freq.cache_info().currsize == len(spec.rope_tables) == 2
    rope = Rope.at(spec, torch.arange(4), torch.float32)
    assert not rope.cos[0].is_inference()
    assert not any(each.is_inference() for pair in module._tables.values() for each in pair)
    heads = torch.ones(4, 2, spec.head_dim, requires_grad=True)
    turned = heads.clone()
    rope.rotate_(turned, 1)
    turned.sum().backward()
    assert heads.grad is not None and heads.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_looked_up_is_what_is_computed(dtype: torch.dtype):
    spec = describe(tiny_model("gemma3_text", torch.float32, layers=3).config)
    module._tables.clear()
    many = torch.tensor([*range(4000, 3900, -1), 0, 1, 2047, 2048, 65_535, 65_536])
    computed = Rope.at(spec, many, dtype)
    assert not module._tables  # that far they aren't remembered
    for rows in (slice(0, 1), slice(3, 67), slice(100, 105), slice(102, 103), slice(99, 106)):
        found = Rope.at(spec, many[rows], dtype)
        assert torch.equal(found.positions, many[rows])
        for table in range(2):
            assert torch.equal(found.cos[table], computed.cos[table][rows])
            assert torch.equal(found.sin[table], computed.sin[table][rows])
    assert [len(cos) for cos, _ in module._tables.values()] == [65_536] * 2
    assert not len(Rope.at(spec, many[:0], dtype).cos[0])
