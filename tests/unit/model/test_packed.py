"""Matrices in panels: the same numbers in another order, wherever they are looked up, multiplied or counted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from engines import ModelReader, native_kernels
from models import tiny_model

from shoal.backends.cpu.native import NativeRows, make_decoder
from shoal.model.families import describe
from shoal.model.kv_layout import stage_layout
from shoal.model.kv_pool import KvPool
from shoal.model.matrix import linear, rows_of
from shoal.model.packed import PackedMatrix, packed
from shoal.model.parameters import ParameterLoader, Parameters
from shoal.model.plan import LayerPlan
from shoal.model.rope import Rope
from shoal.model.rows import TorchRows
from shoal.wire.messages import Stage

CPU = torch.device("cpu")
SIZES = {"hidden": 64, "head_dim": 32}


def counted(outputs: int, inputs: int) -> torch.Tensor:
    """Every number is another one."""
    return torch.arange(outputs * inputs, dtype=torch.float32).view(outputs, inputs)


@pytest.mark.parametrize("shape", [(32, 32), (96, 64), (50, 160), (33, 32)])
def test_it_is_the_same_matrix(shape: tuple[int, int]) -> None:
    weight = counted(*shape)
    made = PackedMatrix.of(weight)
    assert (made.shape, made.dtype, made.device) == (weight.shape, weight.dtype, CPU)
    assert made.values.numel() == -(-shape[0] // 32) * 32 * shape[1]
    assert made.values.double().sum() == weight.double().sum(), "zeros fill it up"
    assert made.values.is_contiguous()
    assert torch.equal(made.unpacked(), weight)
    index = torch.tensor([31, 0, 17, 31])
    assert torch.equal(rows_of(made, index), rows_of(weight, index))
    assert rows_of(made, index[:0]).shape == (0, shape[1])
    inputs, bias = torch.randn(3, shape[1]), torch.randn(shape[0])
    torch.testing.assert_close(linear(inputs, made, bias), F.linear(inputs, weight, bias))
    torch.testing.assert_close(linear(inputs, made, None), F.linear(inputs, weight))


@pytest.mark.parametrize("shape", [(32, 48), (32, 1)])
def test_what_cannot_be_packed_stays_as_it_is(shape: tuple[int, int]) -> None:
    weight = counted(*shape)
    assert packed(weight, "w") is weight


def load(stage: Stage, *, is_tied: bool, num_skipped: int = 2) -> tuple[Parameters, Parameters]:
    """As they are read, and packed as they come."""
    model = tiny_model("llama", tie_word_embeddings=is_tied, vocab=96, **SIZES)
    spec = describe(model.config)
    plan = LayerPlan(spec.num_layers, num_skipped)
    plain, own = (
        ParameterLoader(ModelReader(model), spec, dtype=model.dtype, device=CPU, hold=hold).load(plan, stage)
        for hold in (None, packed)
    )
    return plain, own


@pytest.mark.parametrize("num_sinks", [0, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_kernels_project_by_it_as_torch_does(family: str, num_sinks: int) -> None:
    """With k_norm (qwen3) and without; sinks keep their own matrix."""
    kernels = native_kernels()
    model = tiny_model(family, dtype=torch.bfloat16, hidden=64, head_dim=64)
    spec, plan = describe(model.config), LayerPlan(6, 2)
    loader = ParameterLoader(ModelReader(model), spec, dtype=model.dtype, device=CPU)
    paper = loader.load(plan, Stage.PREFILL).projection
    assert paper is not None and (paper.k_norm is not None) == (family == "qwen3")
    plain = loader.load(plan, Stage.PREFILL, paper.weight * 1.5, num_sinks)
    own = plain.held(packed)
    states = torch.randn(70, spec.hidden_size, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    ours, torchs = (
        make_decoder(spec, plan, Stage.PREFILL, parameters, by).project(states, torch.arange(70))
        for parameters, by in ((own, kernels), (plain, None))
    )
    assert ours.shape == (2, 70, 2, spec.num_kv_heads, spec.head_dim)
    torch.testing.assert_close(ours, torchs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("num_sinks", [0, 3])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("has_kernels", [True, False])
def test_some_layers_by_themselves_are_projected_as_all_of_them_are(
    has_kernels: bool, family: str, num_sinks: int
) -> None:
    """With a bias (qwen2), k_norm (qwen3), and another RoPE table for each third layer (gemma3)."""
    kernels = native_kernels() if has_kernels else None
    model = tiny_model(family, layers=8, dtype=torch.bfloat16, hidden=64, head_dim=64)
    spec, plan = describe(model.config), LayerPlan(8, 5)
    loader = ParameterLoader(ModelReader(model), spec, dtype=model.dtype, device=CPU)
    paper = loader.load(plan, Stage.PREFILL).projection
    assert paper is not None
    parameters = loader.load(plan, Stage.PREFILL, paper.weight * 1.5, num_sinks)
    parameters = parameters if kernels is None else parameters.held(packed)
    states = torch.randn(70, spec.hidden_size, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    decoder = make_decoder(spec, plan, Stage.PREFILL, parameters, kernels)
    whole = decoder.project(states, torch.arange(70))
    for layers in (range(3, 4), range(3, 5), range(4, 7), range(5, 8), range(3, 8)):
        part = decoder.project(states, torch.arange(70), layers)
        torch.testing.assert_close(part, whole[layers.start - 3 : layers.stop - 3], rtol=0.01, atol=0.01)
        assert torch.equal(part, whole[layers.start - 3 : layers.stop - 3])


@pytest.mark.parametrize("num_sinks", [0, 3])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("has_kernels", [True, False])
def test_what_is_projected_into_the_pool_is_what_is_projected(has_kernels: bool, family: str, num_sinks: int) -> None:
    """With a bias (qwen2) and k_norm (qwen3), too."""
    kernels = native_kernels() if has_kernels else None
    model = tiny_model(family, dtype=torch.bfloat16, hidden=64, head_dim=64)
    spec, plan = describe(model.config), LayerPlan(6, 2)
    loader = ParameterLoader(ModelReader(model), spec, dtype=model.dtype, device=CPU)
    paper = loader.load(plan, Stage.PREFILL).projection
    assert paper is not None
    parameters = loader.load(plan, Stage.DECODE, paper.weight * 1.5, num_sinks)
    projection = parameters.projection if kernels is None else parameters.held(packed).projection
    rows = TorchRows(spec) if kernels is None else NativeRows(spec, kernels)
    assert projection is not None
    states = torch.randn(70, spec.hidden_size, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    layout = stage_layout(
        num_layers=6, num_kept=4, num_held=6, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, dtype_bytes=2,
        block_tokens=16,
    )  # fmt: skip
    pool = KvPool(layout, 6, dtype=torch.bfloat16, device=CPU)
    slots = torch.randperm(96, generator=torch.Generator().manual_seed(2))[:70]
    rope = Rope.at(spec, torch.arange(70), states.dtype)
    rows.project_and_store(projection, states, rope, pool, plan.num_kept, slots)
    projected = rows.project(projection, states, rope)
    for layer in range(plan.num_layers):
        expected = torch.zeros_like(pool.layers[layer])
        if layer in plan.skipped:
            expected[slots] = projected[layer - plan.num_kept]
        assert torch.equal(pool.layers[layer], expected)
