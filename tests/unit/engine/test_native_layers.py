"""Whole layers in one call: what they bring is what one operation after the other brings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engines import Ask, divergence, kernel_model, make_engine, native_kernels, parameters_of, run
from shoal.engine.engine import Engine
from shoal.engine.native import NativeRows
from shoal.kernels.native import NativeKernels
from shoal.messages import Depth, SamplingParams

PROMPT = [3 + index * 7 % 90 for index in range(150)]
ASKS = [Ask(PROMPT[: 5 + 7 * index], num_tokens=8) for index in range(20)]


@pytest.fixture(scope="module")
def kernels() -> NativeKernels:
    return native_kernels()


def next_logits(engine: Engine, streams: int, *, in_one_call: bool, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """``[streams, vocab]`` of a step that only decodes, after prompts of different lengths."""
    decoder = engine.runner.decoder
    layers, counted = decoder._run_layers, list[bool]()
    assert layers is not None

    def watched(*arguments: Any) -> torch.Tensor | None:
        out = layers(*arguments) if in_one_call else None
        counted.append(out is not None)
        return out

    monkeypatch.setattr(decoder, "_run_layers", None)  # until then all is alike
    for index in range(streams):
        prompt = tuple(PROMPT[: 5 + 7 * index % 140])
        engine.submit_generate(str(index), prompt, Depth.SHALLOW, SamplingParams(max_tokens=60, temperature=0.0))
    assert any(len(engine.step().tokens) == streams for _ in range(20))
    monkeypatch.setattr(decoder, "_run_layers", watched)
    engine.scheduler.admit()
    logits = engine.runner.run(engine.scheduler.schedule()).logits
    assert logits is not None
    assert counted == [in_one_call, in_one_call], "kept and skipped layers"
    for index in range(streams):
        engine.finish(str(index))
    return logits


@pytest.mark.parametrize("streams", [1, 12, 40])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("is_int8", [False, True])
def test_the_same_as_one_by_one(
    kernels: NativeKernels, family: str, streams: int, is_int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = kernel_model(family, torch.bfloat16)
    held = parameters_of(model, 2).in_int8() if is_int8 else None
    whole, parts = (
        next_logits(
            make_engine(model, 2, kernels=kernels, parameters=held, num_blocks=2048),
            streams,
            in_one_call=in_one_call,
            monkeypatch=monkeypatch,
        )
        for in_one_call in (True, False)
    )
    if family != "qwen3":
        assert torch.equal(whole, parts)
    else:  # whose norms of heads are torch's, one by one: it rounds in other places
        assert max(divergence(ours, theirs) for ours, theirs in zip(whole, parts, strict=True)) < 1e-3


def test_norms_in_float32_are_one_by_one(kernels: NativeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(kernel_model("gemma3_text", torch.bfloat16), 2, kernels=kernels)
    layers, asked = engine.runner.decoder._run_layers, []
    assert layers is not None
    monkeypatch.setattr(engine.runner.decoder, "_run_layers", lambda *arguments: asked.append(layers(*arguments)))
    run(engine, [Ask(PROMPT, num_tokens=3)])
    assert asked
    assert set(asked) == {None}


def test_steps_with_prompts_are_one_by_one(kernels: NativeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but steps that decode comes without the operations of a row."""
    engine = make_engine(kernel_model("llama", torch.bfloat16), 2, kernels=kernels, num_blocks=1024)
    steps, parts = [], []
    monkeypatch.setattr(NativeRows, "gate", lambda self, both, own=NativeRows.gate: parts.append(1) or own(self, both))
    run_step = engine.runner.run

    def counted(plan: Any) -> Any:
        before = len(parts)
        output = run_step(plan)
        steps.append((any(item.end - item.start > 1 for item in plan.rows), len(parts) > before))
        return output

    monkeypatch.setattr(engine.runner, "run", counted)
    run(engine, ASKS)
    assert {has_prompts for has_prompts, _ in steps} == {True, False}
    assert all(has_prompts == is_by_parts for has_prompts, is_by_parts in steps)
