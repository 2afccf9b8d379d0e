"""The figures of given text against the plain reference, computed one token at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import save_tiny
from readings import logits_of_text
from reference import pop_logits, token_nlls

from shoal.model.files import locate
from shoal_lab.quality.arms import CALIBRATED, FULL, Arm
from shoal_lab.quality.subject import Subject, Treatment
from shoal_lab.quality.text_scores import TextScore, measure_passages, score_texts
from shoal_lab.quality.texts import Passage

NUM_PROMPT, NUM_CONTINUATION, SKIPPED = 24, 8, 3
SHALLOW = Arm("shallow", SKIPPED, Treatment.SHALLOW)


def passages(number: int) -> list[Passage]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 97, (number, NUM_PROMPT + NUM_CONTINUATION), generator=generator).tolist()
    return [Passage("tiny", tuple(row[:NUM_PROMPT]), tuple(row[NUM_PROMPT:])) for row in ids]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Subject]:
    folder: Path = tmp_path_factory.mktemp("tiny")
    model = save_tiny(folder, dtype=torch.float64, attention_bias=True)
    return model, Subject.load(locate(str(folder)), dtype=torch.float64, max_tokens=NUM_PROMPT + NUM_CONTINUATION)


def scores(subject: Subject, arms: list[Arm], **kinds: list[Passage]) -> list[TextScore]:
    figures = {kind: measure_passages(subject, arms, found, lambda *_: None) for kind, found in kinds.items()}
    return score_texts(arms, figures, NUM_CONTINUATION, seed=0)


def test_each_figure_is_the_reference_s(tiny):
    model, subject = tiny
    found = scores(subject, [FULL, SHALLOW], tiny=passages(4))[1]
    nats, base, divergence, agreement = [], [], [], []
    for passage in passages(4):
        ids = passage.prompt + passage.continuation[:-1]
        full, shallow = (pop_logits(model, ids, NUM_PROMPT, count) for count in (0, SKIPPED))
        nats += token_nlls(shallow, passage.continuation).tolist()
        base += token_nlls(full, passage.continuation).tolist()
        for theirs, ours in zip(full.softmax(-1), shallow.softmax(-1), strict=True):
            divergence.append(sum(p * math.log(p / q) for p, q in zip(theirs.tolist(), ours.tolist(), strict=True)))
            agreement.append(int(theirs.argmax() == ours.argmax()))
    first = nats[::NUM_CONTINUATION]
    rest = [value for index, value in enumerate(nats) if index % NUM_CONTINUATION]
    for interval, expected in (
        (found.perplexity, math.exp(np.mean(nats))),
        (found.first_perplexity, math.exp(np.mean(first))),
        (found.rest_perplexity, math.exp(np.mean(rest))),
        (found.extra, np.mean(nats) - np.mean(base)),
        (found.divergence, np.mean(divergence)),
        (found.agreement, np.mean(agreement)),
    ):
        assert interval.value == pytest.approx(expected, rel=1e-5)
        assert interval.low <= interval.value <= interval.high
    assert (found.kind, found.treatment, found.num_skipped, found.num_passages) == ("tiny", "shallow", SKIPPED, 4)


@pytest.mark.parametrize("arm", [FULL, Arm("shallow", 1, Treatment.SHALLOW)])
def test_an_arm_that_equals_full_depth_loses_nothing(tiny, arm: Arm):
    found = scores(tiny[1], [FULL, arm], tiny=passages(3))[1]
    for interval, exact in ((found.divergence, 0.0), (found.extra, 0.0), (found.agreement, 1.0)):
        assert (interval.value, interval.low, interval.high) == pytest.approx((exact,) * 3, abs=1e-12)


def test_a_projection_that_is_the_paper_s_recovers_nothing_and_a_whole_one_all(tiny):
    _, subject = tiny
    paper = Arm("shallow", 5, Treatment.SHALLOW)
    same = Arm(CALIBRATED, 5, Treatment.SHALLOW, subject.projection(5))
    whole = Arm("all boundary", 5, Treatment.SHALLOW, num_boundary=1000)
    likeliest = [Passage("tiny", one.prompt, continued(subject, one.prompt)) for one in passages(16)]
    shallow, nothing, everything = scores(subject, [FULL, paper, same, whole], tiny=likeliest)[1:]
    assert shallow.recovered is None
    assert nothing.recovered is not None and everything.recovered is not None
    assert (nothing.recovered.low, nothing.recovered.high) == pytest.approx((0, 0), abs=1e-9)
    assert (everything.recovered.low, everything.recovered.high) == pytest.approx((1, 1))


def continued(subject: Subject, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """As the full model would: there the paper's projection loses enough for a share of it to be told."""
    ids = list(prompt)
    for _ in range(NUM_CONTINUATION):
        ids.append(int(logits_of_text(subject, ids, len(ids), Treatment.FULL).argmax()))
    return tuple(ids[len(prompt) :])


def test_kinds_are_scored_by_themselves_and_together(tiny):
    first, second = passages(5)[:3], passages(5)[3:]
    found = scores(tiny[1], [FULL, SHALLOW], one=first, two=second)
    assert [(score.kind, score.num_passages) for score in found] == [
        ("one", 3), ("one", 3), ("two", 2), ("two", 2), ("all", 5), ("all", 5),
    ]  # fmt: skip
    mean = (3 * found[1].divergence.value + 2 * found[3].divergence.value) / 5
    assert found[5].divergence.value == pytest.approx(mean)
