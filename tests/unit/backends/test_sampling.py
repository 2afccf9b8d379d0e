"""The kernels choose what torch chooses, which tests/unit/engine/test_sampler.py holds against a plain sampler."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from engines import native_kernels
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.backends.chooser import SampleRow, TorchChooser
from shoal.backends.cpu.kernels import NativeKernels
from shoal.backends.cpu.native import NativeChooser
from shoal.engine.sampler import sample
from shoal.errors import InternalError
from shoal.wire.messages import SamplingParams

GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
FREE = SamplingParams(max_tokens=8, temperature=1.0, seed=7)
OPTIONS = [
    FREE,
    replace(FREE, temperature=0.3),
    replace(FREE, temperature=1e-300),
    replace(FREE, temperature=10.0),
    replace(FREE, top_k=1),
    replace(FREE, top_k=40),
    replace(FREE, top_p=0.0),
    replace(FREE, top_p=0.4),
    replace(FREE, top_p=0.999999),
    replace(FREE, temperature=2.0, top_k=100, top_p=0.9),
]
# Around a register's width, and SmolLM2's.
SIZES = [1, 2, 31, 32, 33, 64, 1000, 49152]


@pytest.fixture(scope="module")
def kernels() -> NativeKernels:
    return native_kernels()


def random_logits(num_rows: int, size: int, scale: float = 4.0) -> torch.Tensor:
    return (scale * torch.randn(num_rows, size, generator=torch.Generator().manual_seed(size))).bfloat16()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("params", OPTIONS, ids=str)
def test_draws_are_torchs(kernels: NativeKernels, params: SamplingParams, size: int) -> None:
    logits = random_logits(9, size)
    rows = [SampleRow(params, choice, index, index) for index in range(9) for choice in range(3)]
    assert sample(logits, rows, NativeChooser(kernels)) == sample(logits, rows)


# Apart enough not to become equals once the largest is subtracted, as torch does before it takes the top k.
NUMBERS = [-math.inf, -3.0, -0.0078125, -0.0, 0.0, 0.0078125, 0.5, 2.0, 90.0]


def _irregular(p: float) -> float:
    """Where as many equals as there are make up p exactly, it's rounding that decides on one more."""
    return p * 0.98765432101234


@given(
    values=st.lists(st.sampled_from(NUMBERS), min_size=2, max_size=70),
    seed=st.integers(0, 2**64 - 1), temperature=st.sampled_from([0.0, 1e-3, 0.7, 1.0, 5.0]), top_k=st.integers(0, 9),
    top_p=st.floats(0, 1).map(_irregular), banned=st.sets(st.integers(0, 80)),
)  # fmt: skip
@settings(max_examples=400, deadline=None)
def test_equals_zeros_and_banned_tokens_are_chosen_as_by_torch(
    values: list[float], seed: int, temperature: float, top_k: int, top_p: float, banned: set[int]
) -> None:
    if 0 in banned or values[0] == -math.inf:
        values, banned = [1.0, *values], banned - {0}
    logits = torch.tensor([values]).bfloat16()
    params = replace(FREE, seed=seed, temperature=temperature, top_k=top_k, top_p=top_p)
    rows = [SampleRow(params, 0, index, 0, tuple(banned)) for index in range(4)]
    assert sample(logits, rows, NativeChooser(native_kernels())) == sample(logits, rows)


@pytest.mark.parametrize("size", SIZES)
def test_the_likeliest_is_the_first_of_equals(kernels: NativeKernels, size: int) -> None:
    for scale in (4.0, 1e-3):  # the second has few numbers that differ
        logits = random_logits(33, size, scale)
        logits[5] = -math.inf
        logits[6] = -logits[6].abs() - 1
        found, are_finite = kernels.argmax(logits)
        assert found.tolist() == logits.float().argmax(-1).tolist()
        assert not are_finite  # there's the row of minus infinity


@pytest.mark.parametrize("at", [0, 15, 31, 32, 40])
def test_zeros_are_equals_whatever_their_sign(kernels: NativeKernels, at: int) -> None:
    logits = torch.full((2, 41), -1.0).bfloat16()
    logits[0, at], logits[0, 40] = -0.0, 0.0
    logits[1, at], logits[1, 40] = 0.0, -0.0
    assert kernels.argmax(logits)[0].tolist() == [at, at]


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F81, 0x7FFF, -1, -0x7F])  # negative ones with the sign
@pytest.mark.parametrize("at", [0, 31, 32, 40])
def test_nan_is_found_and_fails_its_row_alone(kernels: NativeKernels, bits: int, at: int) -> None:
    logits = random_logits(3, 41)
    logits.view(torch.int16)[1, at] = bits
    assert logits[1, at].isnan()
    assert int(kernels.argmax(logits)[0][1]) == at
    chooser = NativeChooser(kernels)
    with pytest.raises(InternalError):
        sample(logits, [SampleRow(FREE, 0, 0, i) for i in range(3)], chooser)
    assert len(sample(logits, [SampleRow(FREE, 0, 0, i) for i in (0, 2)], chooser)) == 2


@pytest.mark.parametrize("params", [GREEDY, FREE])
def test_nothing_but_minus_infinity_beside_what_is_banned_is_refused(
    kernels: NativeKernels, params: SamplingParams
) -> None:
    logits = torch.tensor([[1.0, -math.inf, -math.inf]]).bfloat16()
    for chooser in (NativeChooser(kernels), TorchChooser()):
        with pytest.raises(InternalError):
            sample(logits, [SampleRow(params, 0, 0, 0, (0,))], chooser)


def test_a_row_is_drawn_alike_alone_and_in_any_batch(kernels: NativeKernels) -> None:
    logits = random_logits(len(OPTIONS), 3001)
    rows = [SampleRow(params, 1, 5 * i, i) for i, params in enumerate(OPTIONS)]
    chooser = NativeChooser(kernels)
    together = sample(logits, rows, chooser)
    alone = [sample(logits[row.row_index][None], [replace(row, row_index=0)], chooser)[0] for row in rows]
    assert together == alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_what_is_not_bfloat16_is_torchs(kernels: NativeKernels, dtype: torch.dtype) -> None:
    logits = random_logits(6, 500).to(dtype)
    rows = [SampleRow(params, 0, 3, i) for i in range(6) for params in (GREEDY, FREE)]
    assert sample(logits, rows, NativeChooser(kernels)) == sample(logits, rows, TorchChooser())
