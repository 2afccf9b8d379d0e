"""Which arms are compared, and which projectors are found for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import save_tiny, tiny_model

from shoal.errors import ConfigError, MalformedWeights, ProjectorMismatch
from shoal.model.files import ModelFiles, locate
from shoal.model.plan import LayerPlan
from shoal.model.projector import ProjectorHeader, projector_beside, save_projector
from shoal_lab.quality.arms import arms_of, find_projectors
from shoal_lab.quality.evaluation import evaluate
from shoal_lab.quality.evaluation_options import EvaluationOptions
from shoal_lab.quality.subject import Subject

LAYERS = 6
CONTROLS = ["no_projection", "no_boundary", "removed"]


@pytest.fixture
def files(tmp_path: Path) -> ModelFiles:
    save_tiny(tmp_path / "model", dtype=torch.float64, layers=LAYERS)
    return locate(str(tmp_path / "model"))


def write(path: Path, files: ModelFiles, num_skipped: int, *, digest: str | None = None, factor: float = 1.5) -> Path:
    subject = Subject.load(files, dtype=torch.float64, max_tokens=8)
    header = ProjectorHeader(digest or files.digest, LAYERS, LAYERS - num_skipped, "data", {}, {})
    save_projector(path, header, subject.projection(num_skipped).weight * factor)
    return path


def test_controls_come_with_the_first_number_and_calibrated_where_there_is_a_projector(files: ModelFiles):
    write(projector_beside(files, LayerPlan(LAYERS, 3)), files, 3)
    subject = Subject.load(files, dtype=torch.float64, max_tokens=8)
    arms = arms_of(subject, (2, 3), find_projectors("auto", files, (2, 3), LAYERS))
    assert [(arm.name, arm.num_skipped) for arm in arms] == [
        ("full", 0), ("shallow", 2), ("speed", 2), *((control, 2) for control in CONTROLS), ("shallow", 3),
        ("calibrated", 3),
    ]  # fmt: skip
    projection = arms[-1].projection
    assert projection is not None
    torch.testing.assert_close(projection.weight, subject.projection(3).weight * 1.5)


def test_int8_comes_with_the_first_number_for_full_depth_and_what_is_served(files: ModelFiles):
    write(projector_beside(files, LayerPlan(LAYERS, 2)), files, 2)
    subject = Subject.load(files, dtype=torch.float64, max_tokens=8)
    projectors = find_projectors("auto", files, (2, 3), LAYERS)
    arms = arms_of(subject, (2, 3), projectors, (4,), controls=False, int8=True)
    assert [(arm.name, arm.num_skipped) for arm in arms if arm.int8] == [
        ("full, int8", 0), ("shallow, int8", 2), ("calibrated, int8", 2),
        ("shallow, all int8", 2), ("calibrated, all int8", 2),
    ]  # fmt: skip
    assert [arm.name for arm in arms if arm.int8_prompt] == ["shallow, all int8", "calibrated, all int8"]
    assert [arm.name for arm in arms if arm.is_paper] == ["shallow", "shallow"]
    assert not any(arm.int8 for arm in arms_of(subject, (2,), {}))


def test_speed_is_left_out_where_a_skipped_layer_has_a_window(tmp_path: Path):
    save_tiny(tmp_path, tiny_model("mistral", layers=LAYERS))
    subject = Subject.load(locate(str(tmp_path)), dtype=torch.float64, max_tokens=8)
    assert "speed" not in [arm.name for arm in arms_of(subject, (2,), {})]


def test_a_file_goes_before_the_one_beside_the_model_and_leaves_the_others(files: ModelFiles, tmp_path: Path):
    for count in (2, 3):
        write(projector_beside(files, LayerPlan(LAYERS, count)), files, count)
    beside = find_projectors("auto", files, (2, 3), LAYERS)
    other = write(tmp_path / "other.safetensors", files, 3, factor=2.0)
    found = find_projectors(str(other), files, (2, 3), LAYERS)
    assert sorted(found) == [2, 3]
    assert found[2].digest == beside[2].digest and found[3].digest != beside[3].digest
    assert find_projectors("paper", files, (2, 3), LAYERS) == {}


@pytest.mark.parametrize("counts", [(2,), (10,)])
def test_that_it_is_of_another_model_is_said_first(files: ModelFiles, tmp_path: Path, counts: tuple[int, ...]):
    path = tmp_path / "other.safetensors"
    save_projector(path, ProjectorHeader("0" * 64, 30, 20, "data", {}, {}), torch.ones(2, 2))
    for ask in (
        lambda: find_projectors(str(path), files, counts, LAYERS),
        lambda: evaluate(files, EvaluationOptions(skip_layers=counts, projector=str(path)), lambda *_: None),
    ):
        with pytest.raises(ProjectorMismatch, match=r"other\.safetensors was made for another model.*skips 10"):
            ask()


def test_a_projector_of_the_wrong_shape_is_refused(files: ModelFiles, tmp_path: Path):
    header = ProjectorHeader(files.digest, LAYERS, LAYERS - 2, "data", {}, {})
    save_projector(tmp_path / "other.safetensors", header, torch.ones(3, 5))
    subject = Subject.load(files, dtype=torch.float64, max_tokens=8)
    with pytest.raises(MalformedWeights, match="calibrate again"):
        arms_of(subject, (2,), find_projectors(str(tmp_path / "other.safetensors"), files, (2,), LAYERS))


def test_a_projector_of_a_number_that_is_not_evaluated_is_refused(files: ModelFiles, tmp_path: Path):
    path = write(tmp_path / "other.safetensors", files, 3)
    with pytest.raises(ConfigError, match="--skip-layers 3"):
        find_projectors(str(path), files, (2,), LAYERS)
