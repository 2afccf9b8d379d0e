"""Greedy answers by a head that is half read: token for token those of the whole one, and nobody else's business."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engines import Ask, kernel_model, make_engine, native_kernels, run_choices, torch_threads

from shoal.backends.cpu.kernels import NativeKernels
from shoal.backends.cpu.native_steps import MAX_SHORTLIST_ROWS, NativeSteps
from shoal.engine.engine import Engine
from shoal.errors import InternalError
from shoal.wire.messages import Depth, SamplingParams

PROMPT = tuple(3 + index * 7 % 90 for index in range(150))
VOCAB = 5000
GREEDY = SamplingParams(max_tokens=30, temperature=0.0)


@pytest.fixture(scope="module")
def kernels() -> NativeKernels:
    return native_kernels()


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows were settled, each time."""
    noted: list[int] = []
    settle = NativeKernels.settle

    def watched(self: NativeKernels, inputs: torch.Tensor, *others: torch.Tensor) -> int:
        noted.append(len(inputs))
        return settle(self, inputs, *others)

    monkeypatch.setattr(NativeKernels, "settle", watched)
    return noted


@pytest.fixture(params=[1, 2])
def some_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch_threads(request.param):
        yield


def engine_of(model: Any, kernels: NativeKernels, *, is_whole: bool = False, num_blocks: int = 2048) -> Engine:
    """With a shortlist, or without."""
    engine = make_engine(model, 2, kernels=kernels, num_blocks=num_blocks)
    path = engine.runner.decode_path
    assert isinstance(path, NativeSteps) and path.shortlist is not None
    if is_whole:
        path.shortlist = None
    return engine


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("streams", [1, 2, 3, 4])
@pytest.mark.usefixtures("some_threads")
def test_the_tokens_are_the_whole_heads(kernels: NativeKernels, settled: list[int], family: str, streams: int) -> None:
    model = kernel_model(family, torch.bfloat16, vocab=VOCAB)
    asks = [
        Ask([*PROMPT[: 3 + 9 * index]], 30, (Depth.SHALLOW, Depth.FULL)[index % 2], GREEDY) for index in range(streams)
    ]
    expected = run_choices(engine_of(model, kernels, is_whole=True), asks)
    assert not settled
    assert run_choices(engine_of(model, kernels), asks) == expected
    assert (settled.count(streams) > 20) == (streams <= MAX_SHORTLIST_ROWS)
    assert max(settled, default=0) <= MAX_SHORTLIST_ROWS
    assert len({token for choices in expected for tokens in choices for token in tokens}) > 10


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7, "seed": 3}, {"num_logprobs": 0}, {"num_logprobs": 3}, {"min_tokens": 20}],
    ids=str,
)
def test_who_asks_for_more_gets_the_whole_head_and_so_do_those_beside(
    kernels: NativeKernels, settled: list[int], options: dict[str, Any]
) -> None:
    model = kernel_model("llama", torch.bfloat16, vocab=VOCAB)
    sampling = SamplingParams(**{"max_tokens": 20, "temperature": 0.0, **options})
    asks = [Ask([*PROMPT[:40]], sampling=sampling), Ask([*PROMPT[:9]], 20)]
    expected = run_choices(engine_of(model, kernels, is_whole=True), asks)
    assert run_choices(engine_of(model, kernels), asks) == expected
    assert not settled


def test_a_token_that_is_banned_is_never_the_likeliest(kernels: NativeKernels, settled: list[int]) -> None:
    """Each step's likeliest is, which would end the answer: the largest logit alone doesn't say which comes next."""
    model = kernel_model("llama", torch.bfloat16, vocab=VOCAB)
    [[likeliest]] = run_choices(engine_of(model, kernels, is_whole=True), [Ask([*PROMPT[:40]], 12)])
    sampling = SamplingParams(max_tokens=12, temperature=0.0, min_tokens=12, stop_token_ids=tuple({*likeliest}))
    asks = [Ask([*PROMPT[:40]], sampling=sampling)]
    settled.clear()
    ours = run_choices(engine_of(model, kernels), asks)
    assert not settled
    assert ours == run_choices(engine_of(model, kernels, is_whole=True), asks)
    assert not {*ours[0][0]} & {*likeliest}


def test_choices_that_fork_and_answers_that_give_way(kernels: NativeKernels, settled: list[int]) -> None:
    model = kernel_model("llama", torch.bfloat16, vocab=VOCAB)
    forks = SamplingParams(max_tokens=20, temperature=0.0, num_choices=3)
    asks = [Ask([*PROMPT[:30]], sampling=forks), *(Ask([*PROMPT[: 20 + index]], 20) for index in range(4))]
    expected = run_choices(engine_of(model, kernels, is_whole=True), asks)
    tight = engine_of(model, kernels, num_blocks=50)
    assert run_choices(tight, asks) == expected
    assert tight.scheduler.num_preemptions > 0 and settled


def test_a_token_that_is_none_is_an_error_as_ever(kernels: NativeKernels, settled: list[int]) -> None:
    model = kernel_model("llama", torch.bfloat16, vocab=VOCAB)
    engine = engine_of(model, kernels)
    engine.submit_generate("one", PROMPT[:9], Depth.FULL, GREEDY)
    while not engine.step().tokens:
        pass
    for layer in engine.runner.pool.layers:
        layer.fill_(math.nan)
    [failure] = engine.step().failures
    assert isinstance(failure.error, InternalError) and settled
