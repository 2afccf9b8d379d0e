"""Greedy answers by a head that is half read: token for token those of the whole one, and nobody else's business."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import Ask, kernel_model, make_engine, native_kernels, parameters_of, run_choices, torch_threads
from models import save_tiny, tiny_model
from shoal.config import load_config
from shoal.engine.build import load_stage
from shoal.engine.engine import Engine
from shoal.engine.native import hold_for, make_shortlist
from shoal.engine.native_steps import MAX_SHORTLIST_ROWS, NativeSteps
from shoal.kernels.native import NativeKernels
from shoal.messages import Depth, SamplingParams, Stage
from shoal.model.families import describe
from shoal.model.int8 import Int8Matrix
from shoal.model.shortlist import Shortlist

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

    def watched(self: NativeKernels, inputs: torch.Tensor, *others: torch.Tensor) -> None:
        noted.append(len(inputs))
        settle(self, inputs, *others)

    monkeypatch.setattr(NativeKernels, "settle", watched)
    return noted


@pytest.fixture(params=[1, 2])
def some_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch_threads(request.param):
        yield


def engine_of(model: Any, kernels: NativeKernels) -> Engine:
    """With a shortlist."""
    engine = make_engine(model, 2, kernels=kernels, num_blocks=2048)
    path, decoder = engine.runner.decode_path, engine.runner.decoder
    assert isinstance(path, NativeSteps)
    path.shortlist = make_shortlist(decoder.spec, decoder.parameters, kernels)
    assert path.shortlist is not None
    return engine


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("streams", [1, 5, 8, 9])
@pytest.mark.usefixtures("some_threads")
def test_the_tokens_are_the_whole_heads(kernels: NativeKernels, settled: list[int], family: str, streams: int) -> None:
    model = kernel_model(family, torch.bfloat16, vocab=VOCAB)
    asks = [
        Ask([*PROMPT[: 3 + 9 * index]], 30, (Depth.SHALLOW, Depth.FULL)[index % 2], GREEDY) for index in range(streams)
    ]
    expected = run_choices(make_engine(model, 2, kernels=kernels, num_blocks=2048), asks)
    assert not settled
    assert run_choices(engine_of(model, kernels), asks) == expected
    assert (streams in settled) == (streams <= MAX_SHORTLIST_ROWS)
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
    expected = run_choices(make_engine(model, 2, kernels=kernels), asks)
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


def test_a_token_that_is_banned_is_never_the_likeliest(kernels: NativeKernels) -> None:
    """The end token would be, at each step: by the largest logit alone nobody could tell what comes next."""
    model = kernel_model("llama", torch.bfloat16, vocab=VOCAB)
    [[likeliest]] = run_choices(make_engine(model, 2, kernels=kernels), [Ask([*PROMPT[:40]], 12)])
    sampling = SamplingParams(max_tokens=12, temperature=0.0, min_tokens=12, stop_token_ids=tuple({*likeliest}))
    asks = [Ask([*PROMPT[:40]], sampling=sampling)]
    ours = run_choices(engine_of(model, kernels), asks)
    assert ours == run_choices(make_engine(model, 2, kernels=kernels), asks)
    assert not {*ours[0][0]} & {*likeliest}


def test_there_is_one_where_it_pays(kernels: NativeKernels) -> None:
    """Not in int8, where it would say nothing new, nor by torch, nor where logits are capped: equals come of others."""
    model = kernel_model("llama", torch.bfloat16)
    spec, parameters = describe(model.config), parameters_of(model, 2)
    hold = hold_for(kernels)
    assert hold is not None
    assert isinstance(make_shortlist(spec, parameters.held(hold), kernels), Shortlist)
    assert make_shortlist(spec, parameters.held(Int8Matrix.of), kernels) is None
    assert make_shortlist(spec, parameters, None) is None
    capped = kernel_model("gemma2", torch.bfloat16)
    capped_spec = describe(capped.config)
    assert capped_spec.logit_softcap is not None
    assert make_shortlist(capped_spec, parameters_of(capped, 2).held(hold), kernels) is None
    prefill = parameters_of(model, 2, Stage.PREFILL).held(hold)
    assert make_shortlist(spec, prefill, kernels) is None


@pytest.mark.parametrize("weights", ["as_is", "int8"])
async def test_a_decode_stage_has_one(tmp_path: Path, weights: str) -> None:
    native_kernels()
    save_tiny(tmp_path, tiny_model("llama", torch.bfloat16, head_dim=64, hidden=128, intermediate=256))
    settings: dict[str, Any] = {"model": {"name": str(tmp_path), "dtype": "bfloat16"}}
    if weights == "int8":
        settings["decode"] = {"weights": weights}
    path = (await load_stage(load_config(**settings), Stage.DECODE)).engine.runner.decode_path
    assert isinstance(path, NativeSteps)
    assert (path.shortlist is not None) == (weights != "int8")
