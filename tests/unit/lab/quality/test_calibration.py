"""Learning a projection on a tiny random model in float64, where exactness can be told from luck."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import TINY_FAMILIES, save_tiny, tiny_model
from readings import logits_of_text

from shoal.errors import CalibrationError
from shoal.model.files import locate
from shoal_lab.quality.calibration import CalibrationOptions, Calibrator, Example
from shoal_lab.quality.subject import Subject, Treatment
from shoal_lab.quality.texts import Passage

NUM_PROMPT, NUM_CONTINUATION = 24, 8
OPTIONS = CalibrationOptions(num_skipped=3, num_steps=20, learning_rate=3e-3, held_out_every=4)


def passages(number: int) -> list[Passage]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 97, (number, NUM_PROMPT + NUM_CONTINUATION), generator=generator).tolist()
    return [Passage("tiny", tuple(row[:NUM_PROMPT]), tuple(row[NUM_PROMPT:])) for row in ids]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder: Path = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, dtype=torch.float64, attention_bias=True)
    return Subject.load(locate(str(folder)), dtype=torch.float64, max_tokens=NUM_PROMPT + NUM_CONTINUATION)


def calibrator(subject: Subject, options: CalibrationOptions = OPTIONS) -> Calibrator:
    return Calibrator(subject, options, lambda _name, _done, _total: None)


@pytest.fixture(scope="module")
def observed(subject: Subject):
    return calibrator(subject).observe(passages(16))


def test_a_matrix_is_judged_as_it_will_be_served(subject: Subject, observed):
    _, held_out, _ = observed
    wrong = 1.5 * calibrator(subject).paper.weight
    scores = [
        float(calibrator(subject, replace(OPTIONS, sinks_apart=apart, num_sinks=number)).divergence(wrong, held_out[0]))
        for apart, number in ((False, 4), (False, 0), (True, 0), (True, 4))
    ]
    assert scores[0] == scores[1] == scores[2] != scores[3]


def test_of_the_first_skipped_layer_nothing_is_left_to_learn(subject: Subject, observed):
    # The least-squares solution itself is the paper's matrix: its K/V come from the true state.
    paper = calibrator(subject).paper.weight
    rows = len(paper) // 3
    torch.testing.assert_close(observed[2].solve(paper * 0, 1e-12)[:rows], paper[:rows], atol=1e-6, rtol=1e-6)


def test_the_first_skipped_layer_keeps_the_paper_s_matrix_exactly(subject: Subject, observed):
    learnt, held_out, sums = observed
    one = calibrator(subject)
    weight, _ = one.solve(sums, held_out)
    rows = len(weight) // 3
    for found in (weight, one.refine(weight, learnt)):
        assert torch.equal(found[:rows], one.paper.weight[:rows])
        assert not torch.equal(found[rows:], one.paper.weight[rows:])


def test_the_ridge_that_serves_held_out_text_best_is_taken(subject: Subject, observed):
    _, held_out, sums = observed
    one = calibrator(subject, replace(OPTIONS, ridges=(1e-6, 1e-2, 1.0, 1e6)))
    weight, ridge = one.solve(sums, held_out)
    each = {
        tried: one.mean_divergence(
            calibrator(subject, replace(OPTIONS, ridges=(tried,))).solve(sums, held_out)[0], held_out
        )
        for tried in (1e-6, 1e-2, 1.0, 1e6)
    }
    assert ridge == min(each, key=each.__getitem__)
    assert one.mean_divergence(weight, held_out) == min(each.values())


def test_the_divergence_is_that_of_the_served_logits(subject: Subject, observed):
    learnt, _, _ = observed
    one, example = calibrator(subject), learnt[0]
    full = logits_of_text(subject, example.ids, NUM_PROMPT, Treatment.FULL).log_softmax(-1)
    shallow = logits_of_text(subject, example.ids, NUM_PROMPT, Treatment.SHALLOW, 3).log_softmax(-1)
    expected = F.kl_div(shallow, full, reduction="none", log_target=True).sum(-1).mean()
    torch.testing.assert_close(one.divergence(one.paper.weight, example).item(), expected.item(), atol=1e-5, rtol=1e-4)


def test_its_gradient_is_a_finite_difference(subject: Subject, observed):
    one, example = calibrator(subject), observed[0][0]
    weight = one.paper.weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(one.divergence(weight, example), weight)
    direction = gradient / gradient.norm()
    step = 1e-2
    ahead, behind = (one.divergence((weight + sign * step * direction).detach(), example).item() for sign in (1, -1))
    assert (ahead - behind) / (2 * step) == pytest.approx(gradient.norm().item(), rel=1e-2)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_can_be_refined(family: str, tmp_path: Path):
    """Norms of keys, windows and caps stand between a projection and what is read: all can be differentiated."""
    save_tiny(tmp_path, tiny_model(family))
    tiny = Subject.load(locate(str(tmp_path)), dtype=torch.float64, max_tokens=NUM_PROMPT + NUM_CONTINUATION)
    one = calibrator(tiny, replace(OPTIONS, num_steps=30))
    learnt, held_out, sums = one.observe(passages(8))
    weight, _ = one.solve(sums, held_out)
    test_its_gradient_is_a_finite_difference(tiny, (learnt,))
    assert mean(one, one.refine(weight, learnt), learnt) < mean(one, weight, learnt)


def mean(one: Calibrator, weight: torch.Tensor, examples: list[Example]) -> float:
    return one.mean_divergence(weight, examples)


def test_refining_brings_the_continuations_nearer(subject: Subject, observed):
    learnt, held_out, sums = observed
    one = calibrator(subject, replace(OPTIONS, num_steps=60))
    weight, _ = one.solve(sums, held_out)
    assert mean(one, one.refine(weight, learnt), learnt) < 0.8 * mean(one, weight, learnt)


def test_a_refinement_that_explodes_is_an_error(subject: Subject, observed):
    learnt, _, _ = observed
    one = calibrator(subject)
    with pytest.raises(CalibrationError, match="learning-rate"):
        one.refine(one.paper.weight, [replace(learnt[0], state=learnt[0].state * float("inf"))])
