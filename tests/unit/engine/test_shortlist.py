"""Greedy answers by a head that is half read: token for token those of the whole one, and nobody else's business."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Ask, kernel_model, make_engine, native_kernels, parameters_of, run_choices, torch_threads
from models import save_tiny, tiny_model

from shoal.backends.cpu import native_steps
from shoal.backends.cpu.kernels import NativeKernels
from shoal.backends.cpu.native import make_decode_path
from shoal.backends.cpu.native_steps import MAX_SHORTLIST_ROWS, NativeSteps
from shoal.config import load_config
from shoal.engine.build import load_stage
from shoal.engine.engine import Engine
from shoal.errors import InternalError
from shoal.model.int8 import Int8Matrix
from shoal.model.plan import Anchors
from shoal.model.shortlist import Shortlist
from shoal.wire.messages import Depth, SamplingParams, Stage

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


def test_after_as_many_tokens_as_there_must_be_it_goes_by_the_shortlist(
    kernels: NativeKernels, settled: list[int]
) -> None:
    """Until then the likeliest may be one that would end the answer."""
    model = kernel_model("llama", torch.bfloat16, vocab=VOCAB)
    engine = engine_of(model, kernels)
    run_choices(engine, [Ask([*PROMPT[:40]], sampling=SamplingParams(max_tokens=20, temperature=0.0, min_tokens=12))])
    assert settled == [1] * 8


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


def test_where_the_largest_may_be_anywhere_the_whole_head_is_read_for_a_while(
    kernels: NativeKernels, settled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_steps, "STEPS_WITHOUT_IT", 7)
    model = kernel_model("llama", torch.bfloat16, vocab=VOCAB)
    with torch.no_grad():
        model.lm_head.weight[:] = model.lm_head.weight[:1]  # all equally likely
    assert run_choices(engine_of(model, kernels), [Ask([*PROMPT[:9]], 18)]) == [[[0] * 18]]
    assert settled == [1, 1, 1], "one in eight of 17 steps"


def test_there_is_none_where_it_does_not_pay(kernels: NativeKernels) -> None:
    """In int8 it would say nothing new; of logits that are capped, some that differ become equals."""
    model = kernel_model("llama", torch.bfloat16)
    held = parameters_of(model, 2).held(Int8Matrix.of)
    capped = kernel_model("llama", torch.bfloat16)
    engine = make_engine(capped, 2, kernels=kernels)
    decoder = engine.runner.decoder
    decoder.spec = replace(decoder.spec, logit_softcap=30.0)
    paths = [
        make_engine(model, 2, kernels=kernels, parameters=held).runner.decode_path,
        make_decode_path(decoder, engine.runner.pool, kernels),
    ]
    for path in paths:
        assert isinstance(path, NativeSteps) and path.shortlist is None


@pytest.mark.parametrize("case", ["norms in float32", "deep blocks apart"])
def test_none_is_made_where_nothing_would_use_it(
    kernels: NativeKernels, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shortlist, "of", lambda *_: pytest.fail("it was made"))
    if case == "norms in float32":
        engine = make_engine(kernel_model("gemma3_text", torch.bfloat16), 2, kernels=kernels)
    else:
        engine = make_engine(kernel_model("llama", torch.bfloat16), 2, anchors=Anchors(1), kernels=kernels)
    assert engine.runner.decode_path is None


@pytest.mark.parametrize("weights", ["as_is", "int8"])
async def test_a_decode_stage_has_one(tmp_path: Path, weights: str) -> None:
    native_kernels()
    save_tiny(tmp_path, tiny_model("llama", torch.bfloat16, head_dim=64, hidden=128, intermediate=256))
    settings: dict[str, Any] = {"model": {"name": str(tmp_path), "dtype": "bfloat16"}}
    if weights == "int8":
        settings["decode"] = {"weights": weights}
    loaded = await load_stage(load_config(**settings), Stage.DECODE)
    path, num_bytes = loaded.engine.runner.decode_path, loaded.parameters.num_bytes
    assert isinstance(path, NativeSteps)
    if weights == "int8":
        assert path.shortlist is None and loaded.num_bytes == num_bytes
    else:
        assert path.shortlist is not None and loaded.num_bytes == num_bytes + path.shortlist.num_bytes


async def test_a_prefill_stage_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native_kernels()
    monkeypatch.setattr(Shortlist, "of", lambda *_: pytest.fail("it was made"))
    save_tiny(tmp_path, tiny_model("llama", torch.bfloat16, head_dim=64, hidden=128, intermediate=256))
    settings = {"model": {"name": str(tmp_path), "dtype": "bfloat16"}}
    loaded = await load_stage(load_config(**settings), Stage.PREFILL)
    assert loaded.num_bytes == loaded.parameters.num_bytes
