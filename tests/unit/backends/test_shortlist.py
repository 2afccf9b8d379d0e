"""The largest output, found by int8 and made anew: bit by bit what it would be among all of the weights themselves."""

from __future__ import annotations

import math

import pytest
import torch
from engines import torch_threads

from shoal.backends.cpu.kernels import NativeKernels
from shoal.backends.cpu.native_steps import MAX_SHORTLIST_ROWS
from shoal.model.int8 import LARGEST
from shoal.model.packed import PANEL, PackedMatrix
from shoal.model.shortlist import Shortlist

ROUNDED = 2.0**-8  # of a number that becomes bfloat16


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def by_few_rows(kernels: NativeKernels, inputs: torch.Tensor, shortlist: Shortlist) -> torch.Tensor:
    parts = inputs.split(MAX_SHORTLIST_ROWS)
    return torch.cat([kernels.whole_linear(part, shortlist.values, shortlist.scales) for part in parts])


def outputs_of(
    kernels: NativeKernels, weight: torch.Tensor, inputs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of int8, the same with the largest settled, and of the weights themselves."""
    head = PackedMatrix.of(weight)
    shortlist = Shortlist.of(head)
    assert shortlist is not None
    by_int8 = by_few_rows(kernels, inputs, shortlist)
    settled = by_int8.clone()
    num_made = kernels.settle(inputs, head.values, shortlist.bounds, settled)
    assert 1 <= num_made <= len(head.values)
    assert len({*((by_int8 != settled).nonzero()[:, 1] // PANEL).tolist()}) <= num_made
    return by_int8, settled, kernels.linear(inputs, head.values, head.num_outputs, None)


def assert_the_largest_is_exact(kernels: NativeKernels, settled: torch.Tensor, exact: torch.Tensor) -> None:
    ours, theirs = kernels.argmax(settled)[0], kernels.argmax(exact)[0]
    assert ours.tolist() == theirs.tolist()
    at = theirs[:, None]
    assert torch.equal(settled.gather(1, at).view(torch.int16), exact.gather(1, at).view(torch.int16))


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize(("num_outputs", "size"), [(1, 32), (31, 96), (1072, 576), (5000, 64), (2050, 1536)])
def test_it_is_the_weights_own(
    kernels: NativeKernels, num_threads: int, rows: int, num_outputs: int, size: int
) -> None:
    weight, inputs = random(num_outputs, size), random(rows, size, seed=1)
    inputs[:, :: size // 2] *= 20  # as models have them
    with torch_threads(num_threads):
        _, settled, exact = outputs_of(kernels, weight, inputs)
    assert_the_largest_is_exact(kernels, settled, exact)


@pytest.mark.parametrize(("num_outputs", "size"), [(33, 32), (700, 576), (50, 4096)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("is_whole", [False, True])
def test_the_bounds_hold(kernels: NativeKernels, num_outputs: int, size: int, scale: float, is_whole: bool) -> None:
    """For inputs that are what int8 loses of some output, too: by no others is it off by as much. Of whole numbers it
    loses nothing, and only inputs are rounded."""
    weight = random(num_outputs, size).float()
    if is_whole:
        weight = (weight * 50).clamp(-LARGEST, LARGEST).round()
        weight[:, 0], scale = LARGEST, 2.0 ** round(math.log2(scale))
    head = PackedMatrix.of((weight * scale).bfloat16())
    shortlist = Shortlist.of(head)
    assert shortlist is not None
    exact = head.unpacked().double()
    lost = exact - shortlist.values * shortlist.scales.double()[:, None]
    assert bool(lost.any()) != is_whole
    some = random(32, size, seed=1)
    some[:, 5] *= 300
    for inputs in (some, (lost[:32] / scale * 99).bfloat16()):
        made = by_few_rows(kernels, inputs, shortlist).double()
        off = (made - inputs.double() @ exact.T).abs()
        bound = shortlist.bounds.double() * inputs.double().norm(dim=1, keepdim=True)
        assert bool((off <= bound + ROUNDED * (made.abs() + bound)).all())


@pytest.mark.parametrize("of_inputs", [0, 40, -76, -95])
@pytest.mark.parametrize("of_weights", [0, 40, -74, -80])
def test_where_int8_is_wrong_the_weights_decide(kernels: NativeKernels, of_weights: int, of_inputs: int) -> None:
    """Outputs that differ by what int8 rounds away, each in a panel of its own; of whatever size, also such that their
    squares are nothing."""
    size = 576
    inputs = torch.full((1, size), 2.0**of_inputs).bfloat16()
    weight = torch.zeros(20 * PANEL, size)
    weight[:, :2] = torch.tensor([LARGEST, -LARGEST])  # all have the same scale, and these cancel out
    for number in range(20):
        # By int8 the first is the largest; in truth the last, since others lose what it gains.
        weight[number * PANEL, 2] = 30 - number
        weight[number * PANEL, 3:] = (number - 10) * 0.04
    by_int8, settled, exact = outputs_of(kernels, (weight * 2.0**of_weights).bfloat16(), inputs)
    if of_weights + of_inputs > -100:
        assert by_int8.argmax().item() == 0
        assert exact.argmax().item() == 19 * PANEL
    assert_the_largest_is_exact(kernels, settled, exact)


@pytest.mark.parametrize("rows", [1, 7])
def test_of_equals_the_first_one_stays_the_first(kernels: NativeKernels, rows: int) -> None:
    """Some are equals as they are, others once they are rounded to bfloat16."""
    weight, inputs = random(2000, 576), random(rows, 576, seed=1)
    best = (inputs.float() @ weight.float().T).argmax(dim=1)[0]
    for copy in (1999, 1300, 640, 31):
        weight[copy] = weight[best]
    weight[64:96] = (weight[best].float() * (1 + 1e-3 * random(32, 1).float())).bfloat16()
    _, settled, exact = outputs_of(kernels, weight, inputs)
    assert exact[0].tolist().count(exact[0].max().item()) > 4
    assert_the_largest_is_exact(kernels, settled, exact)


def test_equals_by_rounding_that_int8_rounds_apart(kernels: NativeKernels) -> None:
    """What the weights make of it rounds to 127; of inputs of 16 bits it's less than 126.75, and rounds to 126.5."""
    inputs, weight = torch.zeros(1, 32), torch.zeros(5 * PANEL, 32)
    inputs[0, :4] = torch.tensor([1.0, -0.25, -0.0005, 1.3e-5])
    weight[3 * PANEL, :4] = torch.tensor([LARGEST, 1.0, 1.0, LARGEST])
    weight[4 * PANEL, 0] = LARGEST
    by_int8, settled, exact = outputs_of(kernels, weight.bfloat16(), inputs.bfloat16())
    assert by_int8.argmax().item() == 4 * PANEL
    assert exact.argmax().item() == 3 * PANEL and exact[0, 4 * PANEL] == exact.max()
    assert_the_largest_is_exact(kernels, settled, exact)


def test_little_is_made_anew(kernels: NativeKernels) -> None:
    weight, inputs = random(8000, 576), random(1, 576, seed=1)
    weight[4321] = inputs[0]
    by_int8, settled, exact = outputs_of(kernels, weight, inputs)
    changed = (by_int8 != settled).nonzero()[:, 1] // PANEL
    assert changed.unique().tolist() == [4321 // PANEL]
    assert_the_largest_is_exact(kernels, settled, exact)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen_and_is_nobody_else_s(kernels: NativeKernels, broken: float) -> None:
    weight, inputs = random(1000, 64), random(3, 64, seed=1)
    inputs[1, 7] = broken
    _, settled, exact = outputs_of(kernels, weight, inputs)
    assert not kernels.argmax(settled)[1]
    assert kernels.argmax(settled)[0].tolist()[::2] == kernels.argmax(exact)[0].tolist()[::2]
    torch.testing.assert_close(settled[1], exact[1], rtol=0, atol=0, equal_nan=True)


def test_sums_that_overflow_on_their_way_are_seen(kernels: NativeKernels) -> None:
    """By int8, which sums whole numbers, they'd be nothing."""
    weight, inputs = random(1000, 64), torch.ones(1, 64).bfloat16()
    inputs *= 8
    are_finite = []
    for huge in (3e38, -3e38):  # a processor that rounds only sums is left with the infinity that it has met first
        weight[700, ::2], weight[700, 1::2] = huge, -huge
        by_int8, settled, exact = outputs_of(kernels, weight, inputs)
        assert bool(by_int8.isfinite().all()) and not bool(exact.isfinite().all())
        torch.testing.assert_close(settled[0, 700], exact[0, 700], rtol=0, atol=0, equal_nan=True)
        assert_the_largest_is_exact(kernels, settled, exact)
        are_finite.append(kernels.argmax(settled)[1])
        assert are_finite[-1] == kernels.argmax(exact)[1]
    assert not all(are_finite)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_there_is_none_of_weights_that_are_not_finite(broken: float) -> None:
    weight = random(70, 64)
    assert Shortlist.of(PackedMatrix.of(weight)) is not None
    weight[69, 63] = broken
    assert Shortlist.of(PackedMatrix.of(weight)) is None
