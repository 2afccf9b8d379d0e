"""What computes before the engine does leaves no threads behind that would compete with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import native_kernels
from models import save_tiny, tiny_model

from shoal.config import StageConfig, load_config
from shoal.engine import build
from shoal.engine.ahead import Ahead
from shoal.engine.build import Served, layout_of, load_stage, num_blocks_for
from shoal.errors import ConfigError, ModelError
from shoal.model.packed import PackedMatrix
from shoal.wire.messages import Stage


def test_no_more_context_is_served_than_the_model_was_trained_for(tmp_path: Path) -> None:
    most = save_tiny(tmp_path).config.max_position_embeddings
    assert Served.of(load_config(model={"name": str(tmp_path), "max_context_tokens": most})).max_context_tokens == most
    with pytest.raises(ConfigError, match=f"max_context_tokens is {most + 1}, but the model was trained for {most}"):
        Served.of(load_config(model={"name": str(tmp_path), "max_context_tokens": most + 1}))


@pytest.mark.parametrize("stage", Stage)
async def test_what_it_multiplies_is_held_once_as_the_kernels_want_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Stage
) -> None:
    native_kernels()  # or there is nothing to see
    save_tiny(tmp_path, tiny_model("llama", torch.bfloat16, head_dim=64, hidden=128, intermediate=256))
    stepped_back: list[int] = []
    monkeypatch.setattr(build, "step_back", stepped_back.append)
    load, loads = build.load_parameters, []

    def noted(*args: Any, **options: Any) -> Any:
        loads.append(load(*args, **options))
        return loads[-1]

    monkeypatch.setattr(build, "load_parameters", noted)
    settings = {"model": {"name": str(tmp_path), "dtype": "bfloat16"}}
    loaded = await load_stage(load_config(**settings), stage)
    [held], multiplied = loads, loaded.engine.runner.decoder.parameters
    assert loaded.parameters is multiplied
    assert all(isinstance(layer.down, PackedMatrix) for layer in held.layers)
    for (name, ours), (_, theirs) in zip(held.tensors(), multiplied.tensors(), strict=True):
        assert ours is theirs, name
    assert stepped_back == [loaded.niceness] == [build.PREFILL_NICENESS if stage is Stage.PREFILL else 0]


async def test_what_cannot_be_loaded_says_so():
    with pytest.raises(ModelError, match="no model"):
        await load_stage(load_config(model={"name": "nowhere"}), Stage.DECODE)


@pytest.mark.parametrize("stage", Stage)
async def test_a_pool_that_memory_does_not_hold_says_which_setting_to_lower(tmp_path: Path, stage: Stage):
    save_tiny(tmp_path)
    config = load_config(model={"name": str(tmp_path)}, **{stage: {"num_blocks": 1 << 40}})
    with pytest.raises(ConfigError, match=f"no memory for .* bytes.*lower {stage}.num_blocks"):
        await load_stage(config, stage)


@pytest.mark.parametrize(
    ("device", "num_gpus", "share"),
    [("cpu", 0, 0.25), ("cpu", 1, 0.25), ("cuda", 0, 0.25), ("cuda", 1, 0.7), ("cuda", 2, 0.7), ("cuda", 0.5, 0.35)],
)
def test_a_pool_takes_its_share_of_free_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, num_gpus: float, share: float
):
    """Of a GPU most, where nobody else is on it."""
    save_tiny(tmp_path)
    served = Served.of(load_config(model={"name": str(tmp_path)}))
    layout = layout_of(served, Stage.DECODE, 16)
    monkeypatch.setattr(build, "free_memory_bytes", lambda _: 1000 * layout.block_bytes)
    limits = StageConfig(num_gpus=num_gpus)
    num_blocks = num_blocks_for(limits, layout, served, torch.device(device), 1.0)
    assert num_blocks == pytest.approx(1000 * share, abs=1)


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize("reuse", ["none", "exact"])
async def test_memory_is_taken_ahead_where_prompts_are_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Stage, reuse: str
) -> None:
    save_tiny(tmp_path)
    pieces: list[Ahead] = []
    take = Ahead.take

    def noted(ahead: Ahead) -> None:
        pieces.append(ahead)
        take(ahead)

    monkeypatch.setattr(Ahead, "take", noted)
    settings = {"num_blocks": 64, "reuse": reuse}
    config = load_config(model={"name": str(tmp_path)}, prefill=settings, decode=settings)
    engine = (await load_stage(config, stage)).engine
    assert bool(pieces) == (reuse == "exact")
    assert engine.is_prepared
