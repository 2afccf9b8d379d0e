"""A whole evaluation of a tiny random model: its result, its file, its page, and what it refuses."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_tiny, tiny_llama

from shoal.errors import ConfigError, DataError, ModelError, TooLittleText
from shoal.model.files import ModelFiles, locate
from shoal.model.plan import LayerPlan
from shoal.model.projector import ProjectorHeader, projector_beside, save_projector
from shoal_lab.quality import evaluation as module
from shoal_lab.quality.commands import parse_tasks
from shoal_lab.quality.evaluation import Evaluation, evaluate
from shoal_lab.quality.evaluation_options import EvaluationOptions, Task
from shoal_lab.quality.evaluation_page import loss_plot, render_evaluation, speed_plot, summarize, written
from shoal_lab.quality.retrieval import RetrievalCase, retrieval_cases
from shoal_lab.quality.subject import Subject
from shoal_lab.quality.texts import Kind, Split, load

LAYERS = 6
OPTIONS = EvaluationOptions(
    skip_layers=(3, 2), boundary_tokens=(4,), tasks=tuple(Task), kinds=(Kind.PROSE, Kind.CODE), num_passages=3,
    num_cases=2, prompt_tokens=24, continuation_tokens=6, greedy_tokens=5, retrieval_lengths=(400,),
    dtype=torch.float64,
)  # fmt: skip
CONTROLS = [("no_projection", 3), ("no_boundary", 3), ("removed", 3)]
MORE = [("shallow, 4 boundary", 3), ("calibrated, 4 boundary", 3), ("speed", 3)]
ARMS = [("full", 0), ("shallow", 3), ("calibrated", 3), *MORE, *CONTROLS, ("shallow", 2)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, tiny_llama(layers=LAYERS, context=512)[1])
    files = locate(str(folder))
    weight = Subject.load(files, dtype=torch.float64, max_tokens=8).projection(3).weight
    header = ProjectorHeader(files.digest, LAYERS, LAYERS - 3, "data", {"texts": ["technical", "code"]}, {})
    save_projector(projector_beside(files, LayerPlan(LAYERS, 3)), header, weight * 1.01)
    return files


@pytest.fixture(scope="module")
def found(files: ModelFiles) -> Evaluation:
    return evaluate(files, OPTIONS, ignore)


def ignore(*_: object) -> None:
    pass


def test_every_task_has_a_score_for_every_arm_that_it_can_ask(found: Evaluation):
    kinds = ["prose", "code", "all"]
    assert [(score.kind, score.treatment, score.num_skipped) for score in found.texts] == [
        (kind, *arm) for kind in kinds for arm in ARMS
    ]
    assert {score.num_passages for score in found.texts} == {3, 6}
    for scores in (found.greedy, found.retrieval):
        assert [(score.treatment, score.num_skipped) for score in scores] == ARMS
    assert [time.num_skipped for time in found.prefill] == [0, 3, 2]
    assert found.prefill[0].speed_up == 1 and found.prefill[0].interval is None
    for time in found.prefill[1:]:
        assert time.interval is not None and time.interval.low <= time.speed_up <= time.interval.high
    assert min(time.median_s for time in found.prefill) > 0
    assert len(found.retrieval[0].cells) == 5


def test_a_projector_beside_the_model_is_compared_and_named(found: Evaluation):
    [source] = found.settings.projectors
    assert source.num_skipped == 3 and len(source.digest) == 64 and source.kinds == ("technical", "code")
    calibrated = [score for score in found.texts if score.treatment == "calibrated"]
    assert len(calibrated) == 3
    shallow = [score for score in found.texts if (score.treatment, score.num_skipped) == ("shallow", 3)]
    assert all(one.divergence != other.divergence for one, other in zip(calibrated, shallow, strict=True))


def test_the_same_run_gives_the_same_figures(files: ModelFiles, found: Evaluation):
    again = evaluate(files, OPTIONS, ignore)
    assert replace(again, prefill=()) == replace(found, prefill=())


def test_a_task_that_is_not_asked_for_is_not_done(files: ModelFiles):
    names: set[str] = set()
    alone = evaluate(files, replace(OPTIONS, tasks=(Task.RETRIEVAL,)), lambda name, *_: names.add(name))
    assert names == {"layers", "retrieval cases"}
    assert alone.retrieval and not (alone.texts or alone.greedy or alone.prefill)
    assert "A fact in the prompt" in render_evaluation(alone)
    assert not any(cell.counts for cell in alone.retrieval[0].cells)
    said = "Retrieval tells nothing: in no cell"
    assert said in render_evaluation(alone) and any(line.startswith(f"note: {said}") for line in summarize(alone))
    assert not any("None" in line or "- %" in line for line in summarize(alone))


def test_int8_is_compared_where_it_is_asked_for(files: ModelFiles):
    alone = evaluate(files, replace(OPTIONS, skip_layers=(3,), boundary_tokens=(), controls=False, int8=True), ignore)
    arms = ["full", "shallow", "calibrated", "full, int8", "shallow, int8", "calibrated, int8"]
    arms += ["shallow, all int8", "calibrated, all int8"]
    for scores in (alone.texts[-8:], alone.greedy, alone.retrieval):
        assert [score.treatment for score in scores] == arms
    found = {score.treatment: score for score in alone.texts if score.kind == "all"}
    assert 0 < found["full, int8"].divergence.value < found["shallow"].divergence.value
    page = render_evaluation(alone)
    assert "full, int8" in page and "weights in int8, and (all int8) prefill" in page


def test_the_retrieval_cells_are_chosen_by_cases_of_another_seed(files: ModelFiles, monkeypatch: pytest.MonkeyPatch):
    seen: list[list[RetrievalCase]] = []

    def score(_subject: Subject, _arms: Any, cases: Any, choosing: Any, **_: Any) -> list[Any]:
        seen.extend([cases, choosing])
        return []

    monkeypatch.setattr(module, "score_retrieval", score)
    evaluate(files, replace(OPTIONS, tasks=(Task.RETRIEVAL,), seed=7), ignore)
    cases, choosing = seen
    filler = load(Kind.PROSE, Split.EVALUATION).documents[0]
    assert cases == retrieval_cases(files.tokenizer(), filler, seed=7, num_cases_per_cell=2, lengths=(400,))
    assert len(choosing) == len(cases) and not set(choosing) & set(cases)


def test_users_text_is_measured_on_instead_of_ours(files: ModelFiles, tmp_path: Path):
    path = tmp_path / "mine.txt"
    path.write_text("A text of my own, letter by letter. " * 20)
    alone = evaluate(files, replace(OPTIONS, data=(path,), tasks=(Task.TEXT,)), ignore)
    assert {score.kind for score in alone.texts} == {"mine"}
    assert "mine, 3 passages" in render_evaluation(alone)


def test_texts_of_one_name_are_refused(files: ModelFiles, tmp_path: Path):
    paths = tmp_path / "a" / "mine.txt", tmp_path / "b" / "mine.txt"
    for path in paths:
        path.parent.mkdir()
        path.write_text("A text of my own, letter by letter. " * 20)
    with pytest.raises(ConfigError, match="rename one"):
        evaluate(files, replace(OPTIONS, data=paths, tasks=(Task.TEXT,)), ignore)


def test_damaged_weights_are_said(tmp_path: Path):
    model = save_tiny(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    save_tiny(tmp_path, model)
    with pytest.raises(ModelError, match="damaged"):
        evaluate(locate(str(tmp_path)), replace(OPTIONS, tasks=(Task.TEXT,), projector="paper"), ignore)


def test_the_page_has_every_arm_and_figure_and_both_plots(found: Evaluation):
    page = render_evaluation(found)
    for plot in (loss_plot(found), speed_plot(found)):
        ET.fromstring(plot)
        assert plot in page
    for score in found.texts:
        arm = f"{score.treatment}, {score.num_skipped} skipped" if score.num_skipped else "full"
        row = [arm, written(score.extra), written(score.divergence), written(score.agreement, 100, 1)]
        assert "".join(f"<td>{cell}</td>" for cell in row) in page
    for greedy in found.greedy:
        assert f"<td>{written(greedy.prefix, digits=1)}</td>" in page
    assert found.settings.model_digest in page
    assert "learnt from technical, code" in page and page.count("Beware: the projector that skips 3 learnt") == 1


def test_that_units_are_too_few_is_said_in_file_page_and_terminal(found: Evaluation):
    said = "Too few for an interval: 3 prose passages, 3 code passages, 4 greedy answers, 2 retrieval cases a cell."
    assert found.notes[0].startswith(said) and said in found.to_json()
    assert said in render_evaluation(found) and f"note: {found.notes[0]}" in summarize(found)
    assert all(score.recovered is None for score in found.texts)
    assert "3 passages. Too few for their intervals." in render_evaluation(found)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"skip_layers": (6,)}, ConfigError, "choose 1 to 5"),
        ({"skip_layers": (0,)}, ConfigError, "choose 1 to 5"),
        ({"skip_layers": (2, 2)}, ConfigError, "twice"),
        ({"num_passages": 1}, ConfigError, "2 or more"),
        ({"num_cases": 1}, ConfigError, "2 or more"),
        ({"continuation_tokens": 1}, ConfigError, "2 tokens or more"),
        ({"prompt_tokens": 510}, ConfigError, "lower --prompt-tokens"),
        ({"retrieval_lengths": (700,)}, ConfigError, "leave it out of --tasks"),
        ({"retrieval_lengths": (100,)}, TooLittleText, "don't fit"),
        ({"num_passages": 100_000}, TooLittleText, "lower --passages, --prompt-tokens or --continuation-tokens"),
        ({"data": (Path("missing.txt"),)}, DataError, "can't read missing.txt"),
    ],
)
def test_what_can_not_be_evaluated_is_refused_before_weights_are_read(
    files: ModelFiles, change: dict[str, Any], error: type[Exception], says: str
):
    names: set[str] = set()
    with pytest.raises(error, match=says):
        evaluate(files, replace(OPTIONS, **change), lambda name, *_: names.add(name))
    assert not names


def test_tasks_are_named_with_commas_between_them():
    assert parse_tasks("text, retrieval,text") == (Task.TEXT, Task.RETRIEVAL)
    with pytest.raises(ConfigError, match="text, greedy, retrieval"):
        parse_tasks("text,reading")
