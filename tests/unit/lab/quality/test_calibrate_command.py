"""``shoal calibrate`` as a user runs it, on a tiny model and little text."""

from __future__ import annotations

import json
import random
import string
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_tiny
from typer.testing import CliRunner

from shoal.cli import app
from shoal.errors import CalibrationError, ConfigError, DataError, TooLittleText
from shoal.model.files import locate
from shoal.model.plan import LayerPlan
from shoal.model.projector import find_projector
from shoal_lab.quality import commands
from shoal_lab.quality.calibration import RIDGES, RIDGES_SINKS_APART, CalibrationOptions, Calibrator
from shoal_lab.quality.commands import run_calibrate
from shoal_lab.quality.limits import MIN_PASSAGES
from shoal_lab.quality.subject import Subject
from shoal_lab.quality.texts import Kind, Split, load


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


@pytest.mark.parametrize(("flags", "ridges"), [([], RIDGES), (["--sinks-apart"], RIDGES_SINKS_APART)])
def test_with_sinks_apart_the_prior_is_stronger(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], ridges: tuple[float, ...]
):
    asked: list[CalibrationOptions] = []

    def remember(*_: Any, options: CalibrationOptions, **__: Any) -> str:
        asked.append(options)
        return ""

    monkeypatch.setattr(commands, "run_calibrate", remember)
    done = CliRunner().invoke(app, ["calibrate", "some", "--skip-layers", "3", *flags])
    assert done.exit_code == 0, done.output
    assert [(one.ridges, one.sinks_apart) for one in asked] == [(ridges, bool(flags))]


def test_another_place_may_be_named(folder: Path, text: Path, tmp_path: Path):
    calibrate(folder, text, output=tmp_path / "here.safetensors", num_steps=0)
    assert (tmp_path / "here.safetensors").is_file()
    assert find_projector("auto", locate(str(folder)), LayerPlan(6, 2)) is None


def test_a_folder_for_it_is_made_or_refused_before_the_work(folder: Path, text: Path, tmp_path: Path):
    calibrate(folder, text, output=tmp_path / "new" / "here.safetensors", num_steps=0)
    assert (tmp_path / "new" / "here.safetensors").is_file()
    with pytest.raises(ConfigError, match="choose another --output"):
        calibrate(folder, tmp_path / "no-such.txt", output=text / "here.safetensors")


def test_other_text_has_another_digest(folder: Path, text: Path, tmp_path: Path):
    other = tmp_path / "other.txt"
    other.write_text(text.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    digests = set()
    for data in (text, other):
        calibrate(folder, data, num_steps=0)
        found = find_projector("auto", locate(str(folder)), LayerPlan(6, 2))
        assert found is not None
        digests.add(found.header.data_digest)
    assert len(digests) == 2


def test_what_ships_is_learnt_from_by_its_calibration_split(folder: Path):
    calibrate(folder, kinds="code", num_passages=20, num_steps=0)
    found = find_projector("auto", locate(str(folder)), LayerPlan(6, 2))
    assert found is not None and found.header.settings["texts"] == ["code"]
    assert found.header.data_digest == sha256(load(Kind.CODE, Split.CALIBRATION).digest.encode()).hexdigest()


def test_too_little_text_is_said(folder: Path, tmp_path: Path):
    (tmp_path / "short.txt").write_text("a few words", encoding="utf-8")
    with pytest.raises(TooLittleText, match="short"):
        calibrate(folder, tmp_path / "short.txt")


def test_bad_data_is_said(folder: Path, tmp_path: Path):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": "no"}), encoding="utf-8")
    with pytest.raises(DataError, match="line 1"):
        calibrate(folder, tmp_path / "bad.jsonl")


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


def test_the_least_that_is_told_can_be_learnt_from(folder: Path, text: Path):
    assert "written" in calibrate(folder, text, num_passages=MIN_PASSAGES, num_steps=0)


def test_nothing_is_left_behind_where_nothing_is_written(folder: Path, tmp_path: Path):
    (tmp_path / "short.txt").write_text("a few words", encoding="utf-8")
    with pytest.raises(TooLittleText):
        calibrate(folder, tmp_path / "short.txt", output=tmp_path / "new" / "deep" / "p.safetensors")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match="is a folder"):
        calibrate(folder, tmp_path / "short.txt", output=tmp_path)


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


def test_damaged_weights_are_said_before_anything_is_learnt(tmp_path: Path, text: Path):
    model = save_tiny(tmp_path / "broken", dtype=torch.float32, context=1024)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    save_tiny(tmp_path / "broken", model)
    with pytest.raises(CalibrationError, match="damaged"):
        calibrate(tmp_path / "broken", text)
