"""Products with weights and inputs in int8 against float64: sums of a block are exact, and so is the bound."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from engines import torch_threads

from shoal.backends.cpu.kernels import NativeKernels
from shoal.errors import InternalError
from shoal.model.int8 import BLOCK, Int8Matrix, rounded_inputs

HALF_BFLOAT16 = 2.0**-8
SHAPES = [(1, 1), (17, 63), (15, 65), (1072, 576), (130, 1537)]


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with torch_threads(request.param):
        yield request.param


def operands(rows: int, outputs: int, size: int) -> tuple[torch.Tensor, Int8Matrix, torch.Tensor]:
    """Inputs, weights and bias; two inputs are much larger than the others, as models have them."""
    generator = torch.Generator().manual_seed(rows + outputs + size)
    inputs = torch.randn(rows, size, generator=generator)
    inputs[:, :: max(1, size // 2)] *= 50
    weight = torch.randn(outputs, size, generator=generator) / 100
    bias = torch.randn(outputs, generator=generator).bfloat16()
    return inputs.bfloat16(), Int8Matrix.of(weight.bfloat16(), "w"), bias


def product(
    kernels: NativeKernels, inputs: torch.Tensor, weight: Int8Matrix, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return kernels.int8_linear(inputs, weight.values, weight.scales, weight.num_outputs, bias)


def wide_weight(weight: Int8Matrix) -> torch.Tensor:
    """``[outputs, inputs]`` in float64, put together here from how it lies."""
    outputs, inputs = weight.shape
    values = weight.values.permute(0, 2, 1, 3).reshape(-1, weight.values.shape[1] * 4)[:outputs, :inputs]
    return (values.double() - 128) * weight.scales[:outputs, None].double()


def assert_exact(out: torch.Tensor, inputs: torch.Tensor, weight: Int8Matrix, bias: torch.Tensor | None) -> None:
    rounded, wide = rounded_inputs(inputs).double(), wide_weight(weight)
    added = torch.zeros(len(wide)) if bias is None else bias.double()
    expected = rounded @ wide.T + added
    bound = 2.0**-21 * (rounded.abs() @ wide.abs().T + added.abs())
    error = (out.double() - expected).abs()
    assert bool((error <= bound + HALF_BFLOAT16 * (expected.abs() + bound)).all())


@pytest.mark.parametrize("rows", [1, 3, 7, 8, 15, 65, 150])
@pytest.mark.parametrize(("outputs", "size"), SHAPES)
def test_sizes(kernels: NativeKernels, num_threads: int, rows: int, outputs: int, size: int) -> None:
    inputs, weight, bias = operands(rows, outputs, size)
    for added in (None, bias):
        out = product(kernels, inputs, weight, added)
        assert out.shape == (rows, outputs) and out.dtype == torch.bfloat16
        assert_exact(out, inputs, weight, added)


@pytest.mark.parametrize("is_gelu", [False, True])
@pytest.mark.parametrize("rows", [1, 20, 65])
@pytest.mark.parametrize(("gated", "size"), [(32, 64), (96, 100), (1536, 576)])
def test_gates_are_those_of_the_products(
    kernels: NativeKernels, num_threads: int, is_gelu: bool, rows: int, gated: int, size: int
) -> None:
    inputs, weight, bias = operands(rows, 2 * gated, size)
    for added in (None, bias):
        both = product(kernels, inputs, weight, added)
        out = kernels.int8_gated_linear(inputs, weight.values, weight.scales, gated, added, is_gelu=is_gelu)
        assert torch.equal(out, kernels.gate(both, is_gelu=is_gelu))


def test_a_row_is_the_same_to_the_bit_alone_and_beside_others(kernels: NativeKernels, num_threads: int) -> None:
    inputs, weight, bias = operands(100, 1072, 576)
    together = product(kernels, inputs, weight, bias)
    for row in (0, 1, 2, 31, 99):
        assert torch.equal(product(kernels, inputs[row : row + 1], weight, bias)[0], together[row])
    for rows in (2, 7, 8, 40):
        assert torch.equal(product(kernels, inputs[:rows], weight, bias), together[:rows])


@pytest.mark.parametrize("size", [64, 14336])
@pytest.mark.parametrize(("value", "number"), [(127, 3.0), (-127, 3.0), (127, -3.0), (-127, -3.0)])
def test_sums_as_large_as_they_get(kernels: NativeKernels, size: int, value: int, number: float) -> None:
    weight = Int8Matrix.of(torch.full((20, size), float(value)), "w")
    inputs = torch.full((5, size), number).bfloat16()
    expected = torch.full((5, 20), size * value * number).bfloat16()
    torch.testing.assert_close(product(kernels, inputs, weight), expected, rtol=HALF_BFLOAT16, atol=0)


def test_a_number_far_above_the_others_takes_the_steps_of_its_block_alone(kernels: NativeKernels) -> None:
    weight = Int8Matrix.of(torch.eye(2 * BLOCK), "w")
    inputs = torch.linspace(-1, 1, 2 * BLOCK)[None].bfloat16()
    inputs[0, 3] = 10_000
    out = product(kernels, inputs, weight)
    assert out[0, 3] == inputs[0, 3]
    assert not out[0, :BLOCK].index_fill(0, torch.tensor([3]), 0).any()
    torch.testing.assert_close(out[0, BLOCK:], inputs[0, BLOCK:], rtol=HALF_BFLOAT16, atol=1 / 253)


def test_what_is_zero_or_nearly(kernels: NativeKernels) -> None:
    inputs, _, bias = operands(5, 33, 100)
    wide = torch.randn(33, 100, generator=torch.Generator().manual_seed(0))
    wide[7] = 0
    weight = Int8Matrix.of(wide, "w")
    inputs[1], inputs[2], inputs[3], inputs[4, BLOCK:] = 0, 1e-38, 1e34, 0
    out = product(kernels, inputs, weight, bias)
    assert torch.equal(out[1], bias) and torch.equal(out[2], bias)
    assert torch.equal(out[:, 7], bias[7].expand(5))
    assert_exact(out, inputs, weight, bias)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 99])
def test_what_is_not_finite_stays_so(kernels: NativeKernels, broken: float, place: int) -> None:
    inputs, weight, _ = operands(5, 33, 100)
    others = product(kernels, inputs, weight)
    inputs[2, place] = broken
    out = product(kernels, inputs, weight)
    assert out[2].isnan().all()
    kept = torch.tensor([0, 1, 3, 4])
    assert torch.equal(out[kept], others[kept])


def test_gates_that_are_not_whole_panels_are_refused(kernels: NativeKernels) -> None:
    inputs, weight, _ = operands(3, 2 * 48, 64)
    with pytest.raises(InternalError, match="shoal_int8_linear"):
        kernels.int8_gated_linear(inputs, weight.values, weight.scales, 48, None, is_gelu=False)
