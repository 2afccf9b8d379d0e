"""Whole layers in one call: what they bring is what one operation after the other brings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engines import (
    Ask,
    divergence,
    emulated_kernels,
    kernel_model,
    logits_after,
    make_engine,
    native_kernels,
    run,
    torch_threads,
    widening_kernels,
)
from models import tiny_model

from shoal.backends.cpu.kernels import NativeKernels
from shoal.engine.engine import Engine
from shoal.wire.messages import Depth, SamplingParams

PROMPT = [3 + index * 7 % 90 for index in range(150)]


@pytest.fixture(scope="module", params=["as they are", "emulated tiles", "widening"])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NativeKernels:
    if request.param == "as they are":
        return native_kernels()
    compile_one = emulated_kernels if request.param == "emulated tiles" else widening_kernels
    return compile_one(tmp_path_factory.getbasetemp().parent / "kernels")


def all_logits(engine: Engine, asks: list[Ask], monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Of every step that samples."""
    found, run_step = [], engine.runner.run

    def watched(plan: Any) -> Any:
        output = run_step(plan)
        if output.logits is not None:
            found.append(output.logits.clone())
        return output

    monkeypatch.setattr(engine.runner, "run", watched)
    run(engine, asks)
    return found


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(("longest", "step_tokens"), [(40, 60), (150, 100)])
def test_steps_with_prompts_in_them(
    kernels: NativeKernels, family: str, longest: int, step_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of both depths, whole and in chunks, beside rows that decode, few and many."""
    model = kernel_model(family, torch.bfloat16)
    depths = (Depth.SHALLOW, Depth.FULL)
    asks = [Ask(PROMPT[: 5 + 29 * index % longest], num_tokens=6, depth=depths[index % 2]) for index in range(9)]
    asks[1] = Ask(PROMPT[:longest], num_tokens=6)
    limits = {"num_blocks": 1024, "max_step_tokens": step_tokens, "max_sequences": 4}
    whole, parts = (make_engine(model, 2, kernels=kernels, **limits) for _ in range(2))
    for engine in (whole, parts):
        engine.runner.decode_path = None
    monkeypatch.setattr(parts.runner.decoder, "_run_layers", None)
    layers, asked = whole.runner.decoder._run_layers, []
    assert layers is not None

    def watched(*arguments: Any) -> torch.Tensor | None:
        asked.append(arguments[4])
        out = layers(*arguments)
        assert out is not None
        return out

    monkeypatch.setattr(whole.runner.decoder, "_run_layers", watched)
    ours, theirs = (all_logits(engine, asks, monkeypatch) for engine in (whole, parts))
    assert any(reads.prompts and reads.groups for reads in asked), "no step had both"
    assert any(reads.num_rows > 64 for reads in asked) == (step_tokens > 64)
    assert len(ours) == len(theirs) > 10
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if family != "qwen3":
            assert torch.equal(mine, other)
            continue
        # Its norms of heads are torch's, one by one: it rounds in other places, until two tokens are as good.
        assert max(divergence(one, two) for one, two in zip(mine, other, strict=True)) < 1e-3
        if not torch.equal(mine.argmax(dim=-1), other.argmax(dim=-1)):
            assert index > 3
            break


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with torch_threads(request.param):
        yield request.param


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("intermediate", "num_tokens"), [(128, 400), (4096, 180), (5632, 70)])
def test_whether_or_not_a_cache_holds_a_block_of_rows(
    kernels: NativeKernels, intermediate: int, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block for each thread, more of them with inputs in chunks, and none where few rows would fill the cache."""
    model = tiny_model("llama", torch.bfloat16, head_dim=64, vocab=96, intermediate=intermediate, layers=2)
    whole, parts = (make_engine(model, 1, kernels=kernels, num_blocks=1024, max_step_tokens=500) for _ in range(2))
    monkeypatch.setattr(parts.runner.decoder, "_run_layers", None)
    prompt = [3 + index * 7 % 90 for index in range(num_tokens)]
    for depth in (Depth.FULL, Depth.SHALLOW):
        ours, theirs = (logits_after(engine, prompt, depth) for engine in (whole, parts))
        assert torch.equal(ours, theirs)


def test_each_layer_of_a_prompt_is_told_of(kernels: NativeKernels) -> None:
    engine = make_engine(kernel_model("llama", torch.bfloat16), 2, kernels=kernels, num_blocks=1024)
    told = []
    engine.told_of_progress(lambda: told.append(1))
    for num_tokens in (20, 150):
        engine.submit_generate(str(num_tokens), tuple(PROMPT[:num_tokens]), Depth.FULL, SamplingParams(max_tokens=1))
        told.clear()
        while not engine.step().tokens:
            pass
        assert len(told) >= 6 + 1, "each of its layers, and its logits"
