"""Products as a shortlist makes them, with weights in int8 and inputs of 16 bits, against float64: what is rounded is
known, so the bound is exact."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from engines import torch_threads

from shoal.backends.cpu.kernels import NativeKernels
from shoal.errors import InternalError

# Of what is stored, and of a row of inputs' largest number.
HALF_BFLOAT16, HALF_STEP = 2.0**-8, 1 / (2 * 32639)
SHAPES = [(1, 1), (16, 64), (17, 63), (15, 65), (50, 96), (1072, 576), (130, 1537), (96, 192)]


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with torch_threads(request.param):
        yield request.param


def operands(rows: int, outputs: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, values and scales; two inputs are much larger than the others, as models have them."""
    generator = torch.Generator().manual_seed(rows + outputs + size)
    inputs = torch.randn(rows, size, generator=generator)
    inputs[:, :: max(1, size // 2)] *= 50
    values = torch.randint(-127, 128, (outputs, size), dtype=torch.int8, generator=generator)
    return inputs.bfloat16(), values, torch.rand(outputs, generator=generator) / 100


def assert_exact(out: torch.Tensor, inputs: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> None:
    wide, weight = inputs.double(), values.double() * scales.double()[:, None]
    expected = wide @ weight.T
    of_inputs = HALF_STEP * wide.abs().amax(dim=1, keepdim=True) * weight.abs().sum(dim=1)
    bound = of_inputs + 2.0**-21 * (wide.abs() @ weight.abs().T)
    error = (out.double() - expected).abs()
    assert bool((error <= bound + HALF_BFLOAT16 * (expected.abs() + bound)).all())


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize(("outputs", "size"), SHAPES)
def test_sizes(kernels: NativeKernels, num_threads: int, rows: int, outputs: int, size: int) -> None:
    inputs, values, scales = operands(rows, outputs, size)
    out = kernels.whole_linear(inputs, values, scales)
    assert out.shape == (rows, outputs) and out.dtype == torch.bfloat16
    assert_exact(out, inputs, values, scales)


@pytest.mark.parametrize("size", [64, 1536])
def test_sums_are_the_same_to_the_bit_however_many_rows_there_are(kernels: NativeKernels, size: int) -> None:
    values = torch.randint(64, 128, (4096, size), dtype=torch.int8, generator=torch.Generator().manual_seed(size))
    inputs = 1 + torch.rand(3, size, generator=torch.Generator().manual_seed(1))  # sums are beyond float32's 2^24
    inputs, scales = inputs.bfloat16(), torch.full((4096,), 1.0)
    together = kernels.whole_linear(inputs, values, scales)
    for rows in (1, 2):
        assert torch.equal(kernels.whole_linear(inputs[:rows], values, scales), together[:rows])


@pytest.mark.parametrize("size", [64, 14336])
@pytest.mark.parametrize(("value", "number"), [(127, 3.0), (-127, 3.0), (127, -3.0), (-127, -3.0), (-128, 3.0)])
def test_sums_as_large_as_they_get(kernels: NativeKernels, size: int, value: int, number: float) -> None:
    values = torch.full((20, size), value, dtype=torch.int8)
    inputs = torch.full((3, size), number).bfloat16()
    assert_exact(kernels.whole_linear(inputs, values, torch.ones(20)), inputs, values, torch.ones(20))


def test_what_is_zero_or_nearly(kernels: NativeKernels) -> None:
    inputs, values, scales = operands(3, 33, 100)
    inputs[0], inputs[1], inputs[2] = 0, 1e-38, 1e34
    scales[7] = 0
    out = kernels.whole_linear(inputs, values, scales)
    assert not out[0].any() and not out[1].any() and not out[:, 7].any()  # what is nearly nothing became nothing
    assert_exact(out[2:], inputs[2:], values, scales)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 63, 64, 99])
def test_what_is_not_finite_stays_so(kernels: NativeKernels, broken: float, place: int) -> None:
    inputs, values, scales = operands(3, 33, 100)
    others = kernels.whole_linear(inputs, values, scales)
    inputs[1, place] = broken
    out = kernels.whole_linear(inputs, values, scales)
    assert out[1].isnan().all()
    kept = torch.tensor([0, 2])
    assert torch.equal(out[kept], others[kept])


def test_more_than_three_rows_are_refused(kernels: NativeKernels) -> None:
    inputs, values, scales = operands(4, 33, 100)
    with pytest.raises(InternalError, match="can't run on these shapes"):
        kernels.whole_linear(inputs, values, scales)
