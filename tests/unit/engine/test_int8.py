"""Stages with weights in int8: by Shoal's kernels, paired with one without, refused where it can't be fast."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engines import (
    Ask,
    divergence,
    kernel_model,
    logits_after,
    make_engine,
    native_kernels,
    parameters_of,
    run,
    run_handed_off,
)
from int8 import dequantized
from models import save_tiny, tiny_model

from shoal.backends.cpu.kernels import NativeKernels
from shoal.config import load_config
from shoal.engine import build
from shoal.engine.build import Served, load_stage
from shoal.engine.engine import Engine
from shoal.errors import ConfigError
from shoal.model.int8 import Int8Matrix
from shoal.model.packed import PackedMatrix
from shoal.model.projection import KvProjection
from shoal.wire.messages import Depth, Stage

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"]
PROMPT = [3 + index * 7 % 90 for index in range(150)]


@pytest.fixture(scope="module")
def kernels() -> NativeKernels:
    return native_kernels()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_step_tokens", [512, 37])
def test_as_near_to_float32_as_torch(kernels: NativeKernels, family: str, max_step_tokens: int) -> None:
    """Both steps of many rows and of few. Float32 is of the same int8 weights."""
    rounded = kernel_model(family, torch.bfloat16)
    wide = dequantized(copy.deepcopy(rounded).float())
    held = parameters_of(rounded, 2).held(Int8Matrix.of)
    exact = logits_after(make_engine(wide, 2), PROMPT, Depth.FULL)
    torchs, ours = (
        logits_after(
            make_engine(rounded, 2, parameters=held, kernels=own, max_step_tokens=max_step_tokens), PROMPT, Depth.FULL
        )
        for own in (None, kernels)
    )
    assert not torch.equal(ours, torchs), "the kernels weren't asked"
    assert divergence(ours, exact) < 2 * divergence(torchs, exact) + 1e-3


async def test_a_stage_holds_half_and_pairs_with_a_prefill_that_does_not(
    kernels: NativeKernels, tmp_path: Path
) -> None:
    save_tiny(tmp_path, tiny_model("llama", torch.bfloat16, head_dim=64, hidden=128, intermediate=256))
    limits = {"num_blocks": 64}
    config = load_config(
        model={"name": str(tmp_path), "dtype": "bfloat16"}, prefill=limits, decode=limits | {"weights": "int8"}
    )
    plain = load_config(model={"name": str(tmp_path), "dtype": "bfloat16"}, prefill=limits, decode=limits)
    assert Served.of(config).plan_hash == Served.of(plain).plan_hash
    ours, theirs = await load_stage(config, Stage.DECODE), await load_stage(plain, Stage.DECODE)
    assert isinstance(ours.parameters.lm_head, Int8Matrix)
    assert ours.parameters.num_bytes < 0.62 * theirs.parameters.num_bytes
    prefill = await load_stage(config, Stage.PREFILL)
    assert isinstance(prefill.parameters.embedding, torch.Tensor)
    [answer] = run_handed_off(prefill.engine, ours.engine, [Ask(PROMPT[:60], num_tokens=4)])
    assert len(answer) == 4


@pytest.mark.parametrize(
    ("dtype", "kernels", "says"),
    [
        ("float32", "auto", "they compute in bfloat16 only; set it to auto"),
        ("bfloat16", "torch", r"set {stage}\.kernels to auto"),
    ],
)
@pytest.mark.parametrize("stage", Stage)
async def test_where_it_cannot_be_fast_it_is_refused_before_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, stage: Stage, dtype: str, kernels: str, says: str
) -> None:
    monkeypatch.setattr(build, "load_parameters", pytest.fail)
    config = load_config(**{"model": {"dtype": dtype}, stage.value: {"weights": "int8", "kernels": kernels}})
    with pytest.raises(ConfigError, match=rf"^{stage}\.weights is int8.*" + says.format(stage=stage)):
        await load_stage(config, stage)


@pytest.mark.parametrize("is_tied", [False, True])
async def test_of_both_pools_a_prompt_is_as_decode_encodes_it_itself(
    kernels: NativeKernels, tmp_path: Path, is_tied: bool
) -> None:
    """Also where the embedding is the head, which decode rounds."""
    sizes = {"head_dim": 64, "hidden": 128, "intermediate": 256}
    save_tiny(tmp_path, tiny_model("llama", torch.bfloat16, **sizes, tie_word_embeddings=is_tied))
    limits = {"num_blocks": 256, "weights": "int8"}
    config = load_config(model={"name": str(tmp_path), "dtype": "bfloat16"}, prefill=limits, decode=limits)
    prefill, decode = await load_stage(config, Stage.PREFILL), await load_stage(config, Stage.DECODE)
    assert all(isinstance(layer.down, Int8Matrix) for layer in prefill.parameters.layers)
    for stage in (prefill, decode):
        assert isinstance(stage.parameters.embedding, Int8Matrix) == is_tied
    assert isinstance(prefill.parameters.projection, KvProjection)
    assert isinstance(prefill.parameters.projection.matrix, PackedMatrix), "in int8 it would be another one"
    ask = Ask(PROMPT, num_tokens=1)
    handed_off = _kv_after(decode.engine, lambda: run_handed_off(prefill.engine, decode.engine, [ask]))
    local = _kv_after(decode.engine, lambda: run(decode.engine, [ask]))
    assert _num_tokens(local) == len(PROMPT)
    # The boundary token is decode's in both, by itself there and among the prompt's here: attention rounds otherwise.
    assert _num_tokens(handed_off - local) <= 1


def _kv_after(engine: Engine, act: Callable[[], object]) -> torch.Tensor:
    """``[layers, slots, numbers]`` of what it writes, zeros elsewhere."""
    layers = engine.runner.pool.layers
    for layer in layers:
        layer.zero_()
    act()
    return torch.stack([layer.flatten(1) for layer in layers])


def _num_tokens(kv: torch.Tensor) -> int:
    return int(kv.any(dim=2).any(dim=0).sum())
