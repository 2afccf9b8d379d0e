"""A whole analysis of a tiny random model: the same from a seed, whether or not it was stopped on the way."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_tiny
from reference import pop_logits, token_nlls

from shoal.errors import ConfigError
from shoal.model.files import ModelFiles, locate
from shoal_lab.quality.analysis import SAMPLES_FILE, Analysis, AnalysisOptions, analyze
from shoal_lab.quality.analysis_page import importance_plot, render_analysis
from shoal_lab.quality.losses import measure_losses
from shoal_lab.quality.subject import Subject

LAYERS = 4


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, dtype=torch.float64, layers=LAYERS)
    return locate(str(folder))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"This is prompt {word}"}) + "\n" for word in "abcdefg"))
    return path


@pytest.fixture
def options(tmp_path: Path, data: Path) -> AnalysisOptions:
    return AnalysisOptions(
        output=tmp_path / "out", data=data, num_samples=8, response_tokens=6, candidates=(2, 1, 3),
        dtype=torch.float64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(files: ModelFiles, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    output = tmp_path_factory.mktemp("whole")
    options = AnalysisOptions(
        output=output, data=data, num_samples=8, response_tokens=6, candidates=(1, 2, 3), dtype=torch.float64
    )
    return analyze(files, options, ignore)


def ignore(name: str, num_done: int, num_total: int) -> None:
    pass


class Stopped(Exception):
    pass


def stop_after(count: int):
    def on_progress(name: str, num_done: int, num_total: int) -> None:
        if name == "responses" and num_done == count:
            raise Stopped

    return on_progress


def test_the_same_seed_is_the_same_analysis_and_another_seed_another(files, options, found):
    assert analyze(files, options, ignore).to_json() == found.to_json()
    other = analyze(files, replace(options, output=options.output / "other", seed=1), ignore)
    assert other.importance != found.importance


@pytest.mark.parametrize("stop", [1, 9])
def test_a_run_that_was_stopped_goes_on_to_the_same_result(files, options, found, stop: int):
    with pytest.raises(Stopped):
        analyze(files, options, stop_after(stop))
    kept = (options.output / SAMPLES_FILE).read_text().splitlines()
    assert len(kept) == 1 + stop
    assert analyze(files, options, ignore).to_json() == found.to_json()
    assert (options.output / SAMPLES_FILE).read_text().splitlines()[: 1 + stop] == kept


def test_a_line_that_was_cut_off_is_made_again(files, options, found):
    analyze(files, options, ignore)
    path = options.output / SAMPLES_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    assert analyze(files, options, ignore).to_json() == found.to_json()
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "says"), [({"seed": 1}, "seed 0, not 1"), ({"response_tokens": 7}, "response_tokens 6, not 7")]
)
def test_samples_of_other_settings_are_refused(files, options, change: dict[str, Any], says: str):
    with pytest.raises(Stopped):
        analyze(files, options, stop_after(1))
    with pytest.raises(ConfigError) as caught:
        analyze(files, replace(options, **change), ignore)
    assert says in caught.value.message and "--output" in caught.value.message


@pytest.mark.parametrize(("line", "says"), [("[]", "no file of samples"), ("nonsense", "no file of samples")])
def test_a_file_that_holds_something_else_is_refused_and_kept(files, options, line: str, says: str):
    options.output.mkdir()
    (options.output / SAMPLES_FILE).write_text(line + "\n")
    with pytest.raises(ConfigError, match=says):
        analyze(files, options, ignore)
    assert (options.output / SAMPLES_FILE).read_text() == line + "\n"


def test_the_last_layer_matters_to_the_answer_and_not_to_the_prompt(found):
    assert found.importance.prefill.mean[-1] == 0 and found.importance.prefill.standard_error[-1] == 0
    assert min(found.importance.decode.mean) > 0 and min(found.importance.prefill.mean[:-1]) > 0
    assert found.contrast == float("inf")  # the last third of four layers is the last


def test_one_skipped_layer_loses_nothing_and_more_lose_more(found):
    one, two, three = found.candidates
    assert one.predicted_loss == 0 and abs(one.measured.divergence.mean) < 1e-9
    assert 1e-3 < two.measured.divergence.mean < three.measured.divergence.mean
    assert 0 < two.predicted_loss < three.predicted_loss


def test_the_recommendation_is_the_most_that_stays_within_the_limit(files, options, found):
    losses = [candidate.measured.divergence.mean for candidate in found.candidates]
    for count, loss in enumerate(losses, start=1):
        assert analyze(files, replace(options, max_loss=loss + 1e-9), ignore).recommended_skip_layers == count
    none = analyze(files, replace(options, candidates=(3,), max_loss=losses[1]), ignore)
    assert none.recommended_skip_layers == 0 and "None of the candidates" in render_analysis(none)


def test_losses_are_those_of_the_reference(tmp_path: Path):
    model = save_tiny(tmp_path, layers=LAYERS)
    subject = Subject.load(locate(str(tmp_path)), dtype=torch.float64, max_tokens=64)
    texts = [((5, 8, 13, 21, 34), (2, 3, 5)), ((40, 30, 20, 10), (7, 11, 13, 17, 19))]
    [found] = measure_losses(subject, texts, [3], lambda done, total: None)
    divergence, extra = [], []
    for prompt, response in texts:
        ids = (*prompt, *response[:-1])
        full, shallow = (pop_logits(model, ids, len(prompt), skipped) for skipped in (0, 3))
        logprobs = full.log_softmax(dim=-1)
        divergence.append(float((logprobs.exp() * (logprobs - shallow.log_softmax(dim=-1))).sum()))
        extra.append(float((token_nlls(shallow, response) - token_nlls(full, response)).sum()))
    assert found.divergence.mean == pytest.approx(sum(divergence) / 8, rel=1e-5)
    assert found.extra.mean == pytest.approx(sum(extra) / 8, rel=1e-5)


def test_the_page_has_each_candidate_and_the_plot(found):
    page = render_analysis(found)
    plot = importance_plot(found)
    ET.fromstring(plot)
    assert plot in page
    for candidate in found.candidates:
        assert f"<td>{candidate.num_skipped}</td><td>{candidate.predicted_loss:.4f}</td>" in page
    assert "skip the last 2 of 4 layers" in page and page.count('class="marked"') == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_samples": 7}, "ask for 8 or more"),
        ({"candidates": (1, 4)}, "choose 0 to 3"),
        ({"candidates": (0, 2)}, "of 1 and more"),
        ({"data": None, "prompt_tokens": 10}, "no shipped prompt fits"),
    ],
)
def test_what_can_not_be_analysed_is_refused_before_weights_are_read(files, options, change: dict[str, Any], says: str):
    names: set[str] = set()
    with pytest.raises(ConfigError, match=says):
        analyze(files, replace(options, **change), lambda name, *_: names.add(name))
    assert not names and not options.output.exists()
