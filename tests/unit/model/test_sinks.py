"""The first tokens of a prompt keep the paper's projection beside a calibrated one, wherever chunks begin."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Ask, exact, make_engine, native_kernels, parameters_of, run, run_handed_off
from models import TINY_FAMILIES, save_tiny, tiny_model
from safetensors.torch import save_file

from shoal.backends.cpu.native import make_decoder
from shoal.model.families import describe
from shoal.model.files import locate
from shoal.model.packed import packed
from shoal.model.plan import LayerPlan
from shoal.model.projector import ProjectorHeader, load_projector, save_projector
from shoal.model.rope import Rope
from shoal.wire.messages import Stage

NUM_SKIPPED, NUM_SINKS = 2, 4
IDS = [5 + 7 * index % 80 for index in range(30)]


def moved(model: Any) -> torch.Tensor:
    """Another matrix than the paper's, of its shape and size."""
    paper = parameters_of(model, NUM_SKIPPED).projection.weight  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(3)
    return paper + paper.std() * torch.randn(paper.shape, generator=generator, dtype=torch.float64).to(paper.dtype)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_rows_are_projected_by_where_they_stand(family: str):
    model = exact(tiny_model(family))
    spec = describe(model.config)
    paper = parameters_of(model, NUM_SKIPPED).projection
    assert paper is not None
    learnt, both = paper.replaced(moved(model)), paper.replaced(moved(model), NUM_SINKS)
    states = torch.randn(9, spec.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for start in (0, 2, NUM_SINKS, 50):
        rope = Rope.at(spec, torch.arange(start, start + 9), torch.float64)
        num_left = max(0, NUM_SINKS - start)
        expected = torch.cat([paper(states, rope)[:, :num_left], learnt(states, rope)[:, num_left:]], dim=1)
        torch.testing.assert_close(both(states, rope), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_alone_in_chunks_or_handed_off_the_answer_is_the_same(family: str):
    model = exact(tiny_model(family))
    projector, ask = moved(model), Ask(IDS, num_tokens=8)

    def engine(stage: Stage, max_step_tokens: int, num_sinks: int = NUM_SINKS) -> Any:
        parameters = parameters_of(model, NUM_SKIPPED, stage, projector, num_sinks=num_sinks)
        return make_engine(model, NUM_SKIPPED, stage=stage, parameters=parameters, max_step_tokens=max_step_tokens)

    whole = run(engine(Stage.DECODE, 512), [ask])
    for max_step_tokens in (3, 7):  # a chunk ends among the sinks, and behind them
        assert run(engine(Stage.DECODE, max_step_tokens), [ask]) == whole
        prefill, decode = engine(Stage.PREFILL, max_step_tokens), engine(Stage.DECODE, 512)
        assert run_handed_off(prefill, decode, [ask]) == whole


def test_shoal_s_kernels_know_them_too():
    kernels = native_kernels()
    model = tiny_model("llama", dtype=torch.bfloat16, head_dim=64)
    spec = describe(model.config)
    parameters = parameters_of(model, NUM_SKIPPED, projector=moved(model), num_sinks=NUM_SINKS)
    assert parameters.projection is not None
    held = replace(parameters, projection=parameters.projection.held(packed))
    plan = LayerPlan(spec.num_layers, NUM_SKIPPED)
    states = torch.randn(9, spec.hidden_size, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    ours, torchs = (
        make_decoder(spec, plan, Stage.PREFILL, its_own, own).project(states, torch.arange(9))
        for its_own, own in ((held, kernels), (parameters, None))
    )
    torch.testing.assert_close(ours, torchs, rtol=0.02, atol=0.02)


def test_a_file_says_how_many_and_one_of_the_first_format_none(tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_tiny(folder, layers=6)
    files, plan = locate(str(folder)), LayerPlan(6, NUM_SKIPPED)
    header = ProjectorHeader(files.digest, 6, 4, "d", {}, {}, num_sinks=NUM_SINKS)
    save_projector(tmp_path / "new.safetensors", header, torch.zeros(128, 64))
    assert load_projector(tmp_path / "new.safetensors", files, plan).header.num_sinks == NUM_SINKS
    said = {"format": 1, "model_digest": files.digest, "num_layers": 6, "num_kept": 4, "data_digest": "d"}
    metadata = {"shoal_projector": json.dumps(said | {"settings": {}, "scores": {}})}
    save_file({"weight": torch.zeros(128, 64)}, tmp_path / "old.safetensors", metadata=metadata)
    assert load_projector(tmp_path / "old.safetensors", files, plan).header.num_sinks == 0
