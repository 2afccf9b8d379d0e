"""Matrices in int8: how they are rounded, multiplied and held, and whole decoders of them in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engines import Ask, ModelReader, exact, logits_after, make_engine, run, run_handed_off
from int8 import dequantized, shallow_logits, whole, with_deep_layers_of
from models import tiny_model

from shoal.errors import MalformedWeights
from shoal.model import int8
from shoal.model.families import FAMILIES, describe
from shoal.model.int8 import Int8Matrix, rounded_inputs
from shoal.model.parameters import ParameterLoader, Parameters
from shoal.model.plan import LayerPlan
from shoal.wire.messages import Depth, Stage

CPU = torch.device("cpu")
SKIPPED = 2
PROMPT = [3 + index * 7 % 90 for index in range(40)]


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def int8_parameters(model: Any, num_skipped: int = SKIPPED) -> Parameters:
    spec = describe(model.config)
    loader = ParameterLoader(ModelReader(model), spec, dtype=model.dtype, device=CPU, hold=Int8Matrix.of)
    return loader.load(LayerPlan(spec.num_layers, num_skipped), Stage.DECODE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (50, 64), (64, 100)])
def test_a_weight_is_half_a_step_away_at_most(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random(*shape, dtype=dtype)
    made = Int8Matrix.of(weight, "w")
    outputs, inputs = shape
    panels, blocks = -(-outputs // 32), -(-inputs // 64)
    assert made.values.dtype == torch.uint8 and made.values.shape == (panels, 16 * blocks, 32, 4)
    assert made.scales.dtype == torch.float32 and made.scales.shape == (32 * panels,)
    assert (made.shape, made.dtype, made.device) == (weight.shape, dtype, CPU)
    scales, values = made.scales[:outputs].double(), values_of(made)
    torch.testing.assert_close(scales, weight.double().abs().amax(dim=1) / 127, rtol=1e-6, atol=0)
    assert int(values.abs().amax(dim=1).min()) == 127
    error = (values * scales[:, None] - weight.double()).abs()
    assert bool((error <= scales[:, None] * (0.5 + 1e-4)).all())
    torch.testing.assert_close(whole(made), (values * scales[:, None]).to(dtype), rtol=1e-6, atol=0)


def values_of(made: Int8Matrix) -> torch.Tensor:
    """``[outputs, inputs]`` in float64, one by one from where each lies. What fills up panels and blocks is nothing."""
    outputs, inputs = made.shape
    whole = torch.empty(32 * made.values.shape[0], 4 * made.values.shape[1], dtype=torch.float64)
    for output in range(whole.shape[0]):
        whole[output] = made.values[output // 32, :, output % 32].flatten().double() - 128
    assert not whole[outputs:].any() and not whole[:, inputs:].any() and not made.scales[outputs:].any()
    return whole[:outputs, :inputs]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 63, 64, 200])
def test_an_input_is_half_a_step_of_its_block_away_at_most(size: int, dtype: torch.dtype) -> None:
    inputs = random(5, size, dtype=dtype)
    inputs[1] = 0
    inputs[2, size // 2] = 1000
    made = rounded_inputs(inputs)
    assert made.dtype == (torch.float64 if dtype is torch.float64 else torch.float32) and made.shape == inputs.shape
    assert not made[1].any()
    for start in range(0, size, 64):
        block, rounded = inputs[:, start : start + 64].double(), made[:, start : start + 64].double()
        step = block.abs().amax(dim=1, keepdim=True) / 127
        assert bool(((rounded - block).abs() <= step * (0.5 + 1e-4)).all())
        whole = rounded / step.where(step > 0, 1)
        torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_an_input_that_is_not_finite_makes_its_block_nan(broken: float) -> None:
    inputs = random(3, 130)
    inputs[1, 70] = broken
    made = rounded_inputs(inputs)
    assert made[1, 64:128].isnan().all() and made.isnan().sum() == 64


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name(broken: float) -> None:
    weight = random(5, 33)
    weight[3, 32] = broken
    with pytest.raises(MalformedWeights, match=r"layers\.3\.qkv holds numbers that aren't finite"):
        Int8Matrix.of(weight, "layers.3.qkv")


@pytest.mark.parametrize("most", [1, 33 * 32 * 4, 33 * 64 * 8, 8 << 20])
def test_piece_by_piece_is_the_same(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    weight, inputs, bias = random(117, 33), random(9, 33), random(117)
    at_once = Int8Matrix.of(weight, "w")
    expected = F.linear(rounded_inputs(inputs), values_of(at_once) * at_once.scales[:117, None].double(), bias)
    monkeypatch.setattr(int8, "_MAX_WIDE_BYTES", most)
    made = Int8Matrix.of(weight, "w")
    assert torch.equal(made.values, at_once.values) and torch.equal(made.scales, at_once.scales)
    torch.testing.assert_close(made.linear(inputs, bias), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made.linear(inputs, None), expected - bias, rtol=1e-12, atol=1e-12)


def test_products_in_bfloat16_are_rounded_once_at_the_end() -> None:
    made = Int8Matrix.of(random(17, 33).bfloat16(), "w")
    inputs, bias = random(9, 33).bfloat16(), random(17).bfloat16()
    weight = values_of(made) * made.scales[:17, None].double()
    exact = F.linear(rounded_inputs(inputs).double(), weight, bias.double())
    torch.testing.assert_close(made.linear(inputs, bias), exact.bfloat16(), rtol=0.004, atol=1e-3)  # the last bit of it


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("depth", [Depth.SHALLOW, Depth.FULL])
def test_a_decoder_is_the_plain_one_of_what_int8_leaves(family: str, depth: Depth) -> None:
    """What of a shallow prompt is projected is as without int8, as prefill's would be."""
    model = exact(tiny_model(family))
    rounded = exact(dequantized(model))
    engine = make_engine(model, SKIPPED, parameters=int8_parameters(model), max_step_tokens=17)
    prefill, num_skipped = (with_deep_layers_of(rounded, model, SKIPPED), SKIPPED)
    if depth is Depth.FULL:
        prefill, num_skipped = rounded, 0
    expected = shallow_logits(prefill, rounded, PROMPT, len(PROMPT), num_skipped)[0]
    found = logits_after(engine, PROMPT, depth)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    plain = logits_after(make_engine(model, SKIPPED), PROMPT, depth)
    assert not torch.allclose(plain, expected, atol=1e-4), "int8 changes nothing: what was tested?"


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_it_goes_on_after_a_prefill_that_is_not_in_int8(family: str) -> None:
    model = exact(tiny_model(family))
    rounded = exact(dequantized(model))
    prefill = make_engine(model, SKIPPED, stage=Stage.PREFILL)
    decode = make_engine(model, SKIPPED, parameters=int8_parameters(model))
    [answer] = run_handed_off(prefill, decode, [Ask(PROMPT, num_tokens=6)])
    ids = [*PROMPT, *answer[:-1]]
    expected = shallow_logits(model, rounded, ids, len(PROMPT), SKIPPED)
    assert expected.argmax(dim=-1).tolist() == answer
    assert len(run(decode, [Ask(PROMPT, num_tokens=6)])[0]) == 6


@pytest.mark.parametrize("is_tied", [True, False])
def test_only_what_is_multiplied_is_in_int8_and_nothing_is_held_twice(is_tied: bool) -> None:
    """An embedding is looked up, unless it's the head, too."""
    model = tiny_model("qwen3", torch.bfloat16, hidden=256, intermediate=512, vocab=500, tie_word_embeddings=is_tied)
    spec, held = describe(model.config), int8_parameters(model)
    plain = ParameterLoader(ModelReader(model), spec, dtype=model.dtype, device=CPU)
    before = plain.load(LayerPlan(spec.num_layers, SKIPPED), Stage.DECODE)
    wide = {name for name, tensor in held.tensors() if not name.endswith((".values", ".scales"))}
    assert {name for name in wide if "norm" not in name} == {"projection.weight", *(() if is_tied else ("embedding",))}
    assert held.projection is not None and before.projection is not None
    assert torch.equal(held.projection.weight, before.projection.weight)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for _, tensor in held.tensors()}
    assert sum(storages.values()) == held.num_bytes
    always = sum(tensor.nbytes for name, tensor in held.tensors() if name in wide)
    matrices = [tensor for name, tensor in before.tensors() if name not in wide]
    filled = [(-(-outputs // 32) * 32, -(-inputs // 64) * 64) for outputs, inputs in (one.shape for one in matrices)]
    assert held.num_bytes == always + sum(outputs * inputs + 4 * outputs for outputs, inputs in filled)
    assert held.num_bytes - always < 0.52 * (before.num_bytes - always)
    assert held.num_bytes < 0.58 * before.num_bytes or not is_tied
