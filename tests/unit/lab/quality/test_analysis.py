"""A whole analysis of a tiny random model: the same from a seed."""

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
from shoal_lab.quality.analysis import Analysis, AnalysisOptions, analyze
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


@pytest.fixture(scope="module")
def options(data: Path) -> AnalysisOptions:
    return AnalysisOptions(data=data, num_samples=8, response_tokens=6, candidates=(2, 1, 3), dtype=torch.float64)


@pytest.fixture(scope="module")
def found(files: ModelFiles, options: AnalysisOptions) -> Analysis:
    return analyze(files, replace(options, candidates=(1, 2, 3)), ignore)


def ignore(name: str, num_done: int, num_total: int) -> None:
    pass


def test_the_same_seed_is_the_same_analysis_and_another_seed_another(files, options, found):
    assert analyze(files, options, ignore).to_json() == found.to_json()
    other = analyze(files, replace(options, seed=1), ignore)
    assert other.importance != found.importance


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
    assert not names
