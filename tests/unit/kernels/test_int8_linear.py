"""Products with weights in int8 against float64: what is rounded is known, so the bound is exact."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from engines import torch_threads
from shoal.errors import InternalError
from shoal.kernels.native import NativeKernels

# Of what is stored, and of a row of inputs' largest number.
HALF_BFLOAT16, HALF_STEP = 2.0**-8, 1 / (2 * 32639)
SHAPES = [(1, 1), (16, 64), (17, 63), (15, 65), (50, 96), (1072, 576), (130, 1537), (96, 192)]


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with torch_threads(request.param):
        yield request.param


def operands(rows: int, outputs: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, values, scales and bias; two inputs are much larger than the others, as models have them."""
    generator = torch.Generator().manual_seed(rows + outputs + size)
    inputs = torch.randn(rows, size, generator=generator)
    inputs[:, :: max(1, size // 2)] *= 50
    values = torch.randint(-127, 128, (outputs, size), dtype=torch.int8, generator=generator)
    scales = torch.rand(outputs, generator=generator) / 100
    return inputs.bfloat16(), values, scales, torch.randn(outputs, generator=generator).bfloat16()


def assert_exact(
    out: torch.Tensor, inputs: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> None:
    wide, weight = inputs.double(), values.double() * scales.double()[:, None]
    expected = wide @ weight.T + (0 if bias is None else bias.double())
    of_inputs = HALF_STEP * wide.abs().amax(dim=1, keepdim=True) * weight.abs().sum(dim=1)
    of_float32 = 2.0**-21 * (wide.abs() @ weight.abs().T + (0 if bias is None else bias.double().abs()))
    bound = of_inputs + of_float32
    error = (out.double() - expected).abs()
    assert bool((error <= bound + HALF_BFLOAT16 * (expected.abs() + bound)).all())


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8, 9, 17, 25, 33, 64])
@pytest.mark.parametrize(("outputs", "size"), SHAPES)
def test_sizes(kernels: NativeKernels, num_threads: int, rows: int, outputs: int, size: int) -> None:
    inputs, values, scales, bias = operands(rows, outputs, size)
    for added in (None, bias):
        out = kernels.int8_linear(inputs, values, scales, added)
        assert out.shape == (rows, outputs) and out.dtype == torch.bfloat16
        assert_exact(out, inputs, values, scales, added)


def test_a_row_is_the_same_alone_and_beside_others(kernels: NativeKernels) -> None:
    inputs, values, scales, bias = operands(64, 1072, 576)
    together = kernels.int8_linear(inputs, values, scales, bias)
    for row in (0, 1, 2, 31, 63):
        assert torch.equal(kernels.int8_linear(inputs[row : row + 1], values, scales, bias)[0], together[row])


@pytest.mark.parametrize("size", [64, 1536])
def test_sums_are_the_same_to_the_bit_however_many_rows_there_are(kernels: NativeKernels, size: int) -> None:
    values = torch.randint(64, 128, (4096, size), dtype=torch.int8, generator=torch.Generator().manual_seed(size))
    inputs = 1 + torch.rand(64, size, generator=torch.Generator().manual_seed(1))  # sums are beyond float32's 2^24
    inputs, scales = inputs.bfloat16(), torch.full((4096,), 1.0)
    together = kernels.int8_linear(inputs, values, scales, None)
    for rows in (1, 2, 3, 8, 16, 24, 32, 40):
        assert torch.equal(kernels.int8_linear(inputs[:rows], values, scales, None), together[:rows])


@pytest.mark.parametrize("size", [64, 14336])
@pytest.mark.parametrize(("value", "number"), [(127, 3.0), (-127, 3.0), (127, -3.0), (-127, -3.0), (-128, 3.0)])
def test_sums_as_large_as_they_get(kernels: NativeKernels, size: int, value: int, number: float) -> None:
    values = torch.full((20, size), value, dtype=torch.int8)
    inputs = torch.full((5, size), number).bfloat16()
    assert_exact(kernels.int8_linear(inputs, values, torch.ones(20), None), inputs, values, torch.ones(20), None)


def test_what_is_zero_or_nearly(kernels: NativeKernels) -> None:
    inputs, values, scales, bias = operands(5, 33, 100)
    inputs[1], inputs[2], inputs[3] = 0, 1e-38, 1e34
    scales[7] = 0
    out = kernels.int8_linear(inputs, values, scales, bias)
    assert torch.equal(out[1], bias) and torch.equal(out[2], bias)
    assert torch.equal(out[:, 7], bias[7].expand(5))
    assert_exact(out, inputs, values, scales, bias)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 63, 64, 99])
def test_what_is_not_finite_stays_so(kernels: NativeKernels, broken: float, place: int) -> None:
    inputs, values, scales, _ = operands(5, 33, 100)
    others = kernels.int8_linear(inputs, values, scales, None)
    inputs[2, place] = broken
    out = kernels.int8_linear(inputs, values, scales, None)
    assert out[2].isnan().all()
    kept = torch.tensor([0, 1, 3, 4])
    assert torch.equal(out[kept], others[kept])


def test_more_rows_than_few(kernels: NativeKernels) -> None:
    inputs, values, scales, _ = operands(65, 16, 64)
    with pytest.raises(InternalError, match="shoal_int8_linear"):
        kernels.int8_linear(inputs, values, scales, None)
