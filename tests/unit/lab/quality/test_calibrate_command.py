"""``shoal calibrate`` as a user runs it, on a tiny model and little text."""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_tiny

from shoal.errors import CalibrationError, ConfigError, TooLittleText
from shoal.model.files import locate
from shoal.model.plan import LayerPlan
from shoal.model.projector import find_projector
from shoal_lab.quality.calibration import CalibrationOptions, Calibrator
from shoal_lab.quality.commands import run_calibrate
from shoal_lab.quality.limits import MIN_PASSAGES
from shoal_lab.quality.subject import Subject


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model", dtype=torch.float32, context=1024)
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    chance = random.Random(1)
    path = tmp_path / "mine.txt"
    path.write_text("".join(chance.choices(string.ascii_letters + " ", k=640 * 24)), encoding="utf-8")
    return path


def calibrate(
    folder: Path, *data: Path, num_skipped: int = 2, num_steps: int = 4, sinks_apart: bool = False, **fields: Any
) -> str:
    options = CalibrationOptions(num_skipped, num_steps=num_steps, sinks_apart=sinks_apart, ridges=(0.1,))
    asked = {"output": None, "kinds": None, "num_passages": 30, "dtype": "float32"} | fields
    return run_calibrate(str(folder), lambda *_: None, data=data, options=options, **asked)


def test_what_it_writes_is_found_beside_the_model(folder: Path, text: Path):
    said = calibrate(folder, text)
    files = locate(str(folder))
    found = find_projector("auto", files, LayerPlan(6, 2))
    assert found is not None and str(folder) in said
    assert found.header.settings["texts"] == ["mine"] and found.header.settings["num_passages"] == 24
    assert set(found.header.scores) == {"paper", "ridge", "refined"}
    assert f"{found.header.scores['refined']:.4f}" in said
    assert found.header.scores["ridge"] < found.header.scores["paper"]


@pytest.mark.parametrize(("sinks_apart", "num_sinks"), [(False, 0), (True, 4)])
def test_the_first_positions_keep_the_paper_s_matrix_where_that_is_wanted(
    folder: Path, text: Path, sinks_apart: bool, num_sinks: int
):
    calibrate(folder, text, num_steps=0, sinks_apart=sinks_apart)
    found = find_projector("auto", locate(str(folder)), LayerPlan(6, 2))
    assert found is not None and found.header.num_sinks == num_sinks
    assert found.header.settings["sinks_apart"] is sinks_apart


def test_an_unknown_kind_names_those_there_are(folder: Path):
    with pytest.raises(ConfigError, match="prose, technical, dialogue, code"):
        calibrate(folder, kinds="prose,poems")


@pytest.mark.parametrize("num_skipped", [1, 6, 60])
def test_layers_that_can_not_be_skipped_are_refused(folder: Path, text: Path, num_skipped: int):
    with pytest.raises(ConfigError, match=rf"--skip-layers is {num_skipped}, .* 6 layers: choose 2 to 5"):
        calibrate(folder, text, num_skipped=num_skipped)


def test_too_few_passages_are_refused_before_the_weights_are_read(
    folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Subject, "load", lambda *_, **__: pytest.fail("the weights are read"))
    with pytest.raises(ConfigError, match=f"{MIN_PASSAGES} of each text are the least"):
        calibrate(folder, text, num_passages=MIN_PASSAGES - 1)
    short = text.with_name("short.txt")
    short.write_text(text.read_text(encoding="utf-8")[: 640 * MIN_PASSAGES - 1], encoding="utf-8")
    with pytest.raises(TooLittleText, match=r"in 1 document hold 19 passages .* more text, or longer documents"):
        calibrate(folder, short)


@pytest.mark.parametrize("num_steps", [0, 4])
def test_a_damaged_head_is_said(tmp_path: Path, text: Path, num_steps: int):
    model = save_tiny(tmp_path / "broken", dtype=torch.float32, context=1024)
    with torch.no_grad():
        model.lm_head.weight[3, 0] = float("nan")
    save_tiny(tmp_path / "broken", model)
    with pytest.raises(CalibrationError, match="damaged"):
        calibrate(tmp_path / "broken", text, num_steps=num_steps)


def test_what_is_worse_than_the_papers_is_not_written(folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch):
    def judged(self: Calibrator, weight: torch.Tensor, examples: Any) -> float:
        return 0.1 if weight is self.paper.weight else 0.2

    monkeypatch.setattr(Calibrator, "mean_divergence", judged)
    with pytest.raises(CalibrationError, match=r"nothing that was learnt beats the paper's.*ridge 0\.2000"):
        calibrate(folder, text)
    assert find_projector("auto", locate(str(folder)), LayerPlan(6, 2)) is None
