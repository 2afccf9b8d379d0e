"""A projector's file: what is written comes back, and what doesn't fit is refused by a message that says why."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Ask, exact, logits_after, make_engine, parameters_of, run, run_handed_off
from models import save_tiny, tiny_model
from reference import Cache, all_layers, encode_shallow, logits_of, run_layers
from safetensors.torch import save_file

from shoal.config import load_config
from shoal.engine.build import Served, load_parameters
from shoal.errors import MalformedWeights, ModelError, ProjectorMismatch
from shoal.model.families import FAMILIES
from shoal.model.files import ModelFiles, locate
from shoal.model.plan import LayerPlan
from shoal.model.projector import ProjectorHeader, find_projector, load_projector, projector_beside, save_projector
from shoal.wire.messages import Depth, Stage

PLAN = LayerPlan(6, 2)
SHAPE = (2 * 2 * 32, 64)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder, dtype=torch.float32)
    return locate(str(folder))


@pytest.fixture
def header(files: ModelFiles) -> ProjectorHeader:
    return ProjectorHeader(files.digest, 6, 4, data_digest="d", settings={"seed": 1}, scores={"kl": 0.1})


def weight(shape: tuple[int, int] = SHAPE, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_what_was_saved_is_loaded(tmp_path: Path, files: ModelFiles, header: ProjectorHeader):
    save_projector(tmp_path / "p.safetensors", header, weight())
    found = load_projector(tmp_path / "p.safetensors", files, PLAN)
    assert found.header == header and torch.equal(found.weight, weight())
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]


def test_another_model_is_refused(tmp_path: Path, files: ModelFiles, header: ProjectorHeader):
    save_projector(tmp_path / "p.safetensors", replace(header, model_digest="other"), weight())
    with pytest.raises(ProjectorMismatch, match="another model"):
        load_projector(tmp_path / "p.safetensors", files, PLAN)


def test_another_plan_is_refused(tmp_path: Path, files: ModelFiles, header: ProjectorHeader):
    save_projector(tmp_path / "p.safetensors", header, weight())
    with pytest.raises(ProjectorMismatch, match="--skip-layers 2"):
        load_projector(tmp_path / "p.safetensors", files, LayerPlan(6, 3))


def test_a_missing_file_says_how_to_make_one(tmp_path: Path, files: ModelFiles):
    with pytest.raises(ModelError, match="shoal calibrate"):
        load_projector(tmp_path / "p.safetensors", files, PLAN)


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\xff" * 100])
def test_a_file_that_can_not_be_read_is_refused(tmp_path: Path, files: ModelFiles, content: bytes):
    (tmp_path / "p.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="calibrate again"):
        load_projector(tmp_path / "p.safetensors", files, PLAN)


@pytest.mark.parametrize("metadata", [None, {"shoal_projector": "[]"}, {"shoal_projector": '{"format": 1}'}], ids=str)
def test_tensors_of_something_else_are_refused(tmp_path: Path, files: ModelFiles, metadata: dict[str, str] | None):
    save_file({"weight": weight()}, tmp_path / "p.safetensors", metadata=metadata)
    with pytest.raises(ModelError, match="no projector"):
        load_projector(tmp_path / "p.safetensors", files, PLAN)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", "6"), ("num_layers", None), ("num_kept", 4.0), ("num_kept", 7), ("num_kept", 0),
        ("model_digest", 5), ("data_digest", None), ("settings", [1]), ("settings", {"texts": "prose"}),
        ("settings", {"texts": [3]}), ("scores", "good"), ("scores", {"kl": None}),
    ],
)  # fmt: skip
def test_a_header_with_fields_of_other_types_is_refused(
    tmp_path: Path, files: ModelFiles, header: ProjectorHeader, field: str, value: Any
):
    said = json.dumps({"format": 1, **asdict(header), field: value})
    save_file({"weight": weight()}, tmp_path / "p.safetensors", metadata={"shoal_projector": said})
    with pytest.raises(ModelError, match=rf"damaged header \(.*{field}.*calibrate again"):
        load_projector(tmp_path / "p.safetensors", files, PLAN)


@pytest.mark.parametrize(
    "tensor", [weight().to(torch.int32), weight()[0], weight().bool()], ids=["int32", "a vector", "bool"]
)
def test_what_is_no_matrix_of_real_numbers_is_refused(
    tmp_path: Path, files: ModelFiles, header: ProjectorHeader, tensor: torch.Tensor
):
    save_projector(tmp_path / "p.safetensors", header, tensor)
    with pytest.raises(ModelError, match="no matrix of real numbers"):
        load_projector(tmp_path / "p.safetensors", files, PLAN)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, files: ModelFiles, header: ProjectorHeader):
    broken = weight()
    broken[3, 3] = float("inf")
    save_projector(tmp_path / "p.safetensors", header, broken)
    with pytest.raises(ModelError, match="finite"):
        load_projector(tmp_path / "p.safetensors", files, PLAN)


def test_auto_takes_the_one_beside_the_model(files: ModelFiles, header: ProjectorHeader):
    assert find_projector("auto", files, PLAN) is None
    path = projector_beside(files, PLAN)
    assert path.parent == files.path
    save_projector(path, header, weight())
    try:
        found = find_projector("auto", files, PLAN)
        assert found is not None and torch.equal(found.weight, weight())
        assert find_projector("paper", files, PLAN) is None
        assert find_projector("auto", files, LayerPlan(6, 0)) is None
    finally:
        path.unlink()


def test_both_stages_serve_it_and_the_plan_hash_tells(tmp_path: Path, files: ModelFiles, header: ProjectorHeader):
    save_projector(tmp_path / "p.safetensors", header, weight())

    def served(projector: str) -> Served:
        model = {"name": str(files.path), "skip_layers": 2, "dtype": "float32", "projector": projector}
        return Served.of(load_config(model=model))

    mine, paper = served(str(tmp_path / "p.safetensors")), served("paper")
    assert mine.plan_hash != paper.plan_hash
    for stage in Stage:
        projection = load_parameters(mine, stage, torch.device("cpu")).projection
        assert projection is not None and torch.equal(projection.weight, weight())


def test_a_projector_of_the_wrong_shape_is_refused(tmp_path: Path, files: ModelFiles, header: ProjectorHeader):
    save_projector(tmp_path / "p.safetensors", header, weight()[:5])
    model = {"name": str(files.path), "skip_layers": 2, "projector": str(tmp_path / "p.safetensors")}
    with pytest.raises(MalformedWeights, match="calibrate again"):
        load_parameters(Served.of(load_config(model=model)), Stage.PREFILL, torch.device("cpu"))


# --- what it computes -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    """Of every family: biases, norms of keys, RoPE tables and windows stay when another matrix comes in.

    None is tied: random and tied, Gemma repeats the last token whatever its K/V are.
    """
    options = {"attention_bias": True} if request.param == "llama" else {"tie_word_embeddings": False}
    return exact(tiny_model(request.param, **options))


def expected(model: Any, projector: torch.Tensor, ids: list[int], num_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens after a shallow prompt whose K/V ``projector`` makes, and the logits of the first
    of them, by the slow reference.

    The paper's projection of a model whose skipped layers have this matrix, and a norm without weight, is it.
    """
    other = copy.deepcopy(model)
    without_weight = 0 if model.config.model_type.startswith("gemma") else 1
    with torch.no_grad():
        for layer, part in zip(exact(other).model.layers[4:], projector.chunk(2), strict=True):
            layer.input_layernorm.weight.fill_(without_weight)
            for matrix, rows in zip((layer.self_attn.k_proj, layer.self_attn.v_proj), part.chunk(2), strict=True):
                matrix.weight.copy_(rows)
    with torch.no_grad():
        cache: Cache = {}
        encode_shallow(other, ids[:-1], 2, cache)
        tokens, logits = [ids[-1]], []
        for position in range(len(ids) - 1, len(ids) - 1 + num_tokens):
            logits += logits_of(model, run_layers(model, tokens[-1:], position, all_layers(model), cache))
            tokens.append(int(logits[-1].argmax()))
    return tokens[1:], logits[0]


def test_served_alone_or_handed_off_it_computes_what_it_says(model: Any):
    num_outputs = 2 * 2 * model.model.layers[0].self_attn.k_proj.out_features
    projector = weight((num_outputs, 64)).double()
    ask = Ask([5 + 7 * index % 80 for index in range(30)], num_tokens=10)
    decode, prefill = (
        make_engine(model, 2, stage=stage, parameters=parameters_of(model, 2, stage, projector), max_step_tokens=9)
        for stage in (Stage.DECODE, Stage.PREFILL)
    )
    tokens, logits = expected(model, projector, ask.prompt, 10)
    torch.testing.assert_close(logits_after(decode, ask.prompt, Depth.SHALLOW), logits, atol=1e-10, rtol=0)
    assert run(decode, [ask]) == [tokens]
    assert run_handed_off(prefill, decode, [ask]) == [tokens]
    assert run(make_engine(model, 2), [ask]) != [tokens], "the paper's projection happens to say the same"


@pytest.mark.parametrize(
    ("num_skipped", "stages"),
    [(6, ("ridge", "paper")), (10, ("refined", "ridge", "paper"))],
    ids=["default, closed form", "deepest, refined"],
)
def test_the_demo_model_has_projectors_that_ship(num_skipped: int, stages: tuple[str, ...]):
    files, plan = locate("smollm2"), LayerPlan(30, num_skipped)
    found = find_projector("auto", files, plan)
    assert found is not None and found.header.model_digest == files.digest
    assert all(found.header.scores[better] < found.header.scores[worse] for better, worse in pairwise(stages))
    assert find_projector("paper", files, plan) is None and find_projector("auto", files, LayerPlan(30, 9)) is None
