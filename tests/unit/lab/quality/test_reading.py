"""One full-depth pass serves every arm: its logits are those of the arm run by itself."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from engines import exact
from int8 import dequantized, shallow_logits, with_deep_layers_of
from models import save_tiny, tiny_model

from shoal.model.files import locate
from shoal.model.plan import LayerPlan
from shoal.model.projection import KvProjection
from shoal_lab.quality.arms import CALIBRATED, FULL, Arm
from shoal_lab.quality.reading import Reading
from shoal_lab.quality.subject import Subject, Treatment

IDS = tuple(7 + index * 31 % 83 for index in range(60))
CONTROLS = (Treatment.NO_PROJECTION, Treatment.NO_BOUNDARY, Treatment.REMOVED)

close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "qwen2"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder: Path = tmp_path_factory.mktemp(request.param)
    save_tiny(folder, tiny_model(request.param))
    return Subject.load(locate(str(folder)), dtype=torch.float64, max_tokens=64)


def arms(subject: Subject) -> list[Arm]:
    paper = subject.projection(3)
    other = paper.replaced(paper.weight + 0.05 * torch.ones_like(paper.weight))
    shallow = [Arm("shallow", count, Treatment.SHALLOW) for count in (1, 3, 5)]
    more = Arm("shallow, 7 boundary", 3, Treatment.SHALLOW, num_boundary=7)
    speed = Arm("speed", 3, Treatment.SPEED)
    controls = [Arm(one, 3, one) for one in CONTROLS]
    return [FULL, *shallow, *controls, Arm(CALIBRATED, 3, Treatment.SHALLOW, other), more, speed]


def alone(subject: Subject, arm: Arm, ids: tuple[int, ...]) -> torch.Tensor:
    """By whole forwards of a decoder of its own, as serving has them: nothing is shared with another arm."""
    num_layers, spec = subject.spec.num_layers, subject.spec
    if arm.treatment is Treatment.NO_BOUNDARY:  # the last prompt token says what it does without the skipped layers
        first = alone(subject, Arm("removed", arm.num_skipped, Treatment.REMOVED), ids)[:1]
        if len(ids) == 40:
            return first
        return torch.cat([first, forward(subject, LayerPlan(num_layers, 3), subject.projection(3), ids, 41, range(40))])
    if arm.treatment is Treatment.REMOVED:
        layers = subject.parameters.layers[: num_layers - arm.num_skipped]
        shorter = Subject(subject.files, spec, replace(subject.parameters, layers=layers), max_tokens=64)
        return forward(shorter, LayerPlan(len(layers), 0), None, ids, 40, range(0))
    if arm.treatment is Treatment.FULL:
        return forward(subject, LayerPlan(num_layers, 0), None, ids, 40, range(0))
    projection = arm.projection or subject.projection(arm.num_skipped)
    hides = arm.treatment in {Treatment.NO_PROJECTION, Treatment.SPEED}
    shallow = range(1 if arm.treatment is Treatment.SPEED else 0, 40 - arm.num_boundary)
    plan = LayerPlan(num_layers, arm.num_skipped)
    return forward(subject, plan, projection, ids, 40, shallow, hides_shallow=hides)


def forward(
    subject: Subject,
    plan: LayerPlan,
    projection: KvProjection | None,
    ids: tuple[int, ...],
    num_prompt: int,
    shallow: range,
    *,
    hides_shallow: bool = False,
) -> torch.Tensor:
    parameters = replace(subject.parameters, projection=projection)
    decoder, batch = subject.step(plan, parameters, ids, num_prompt, shallow, hides_shallow=hides_shallow)
    logits = decoder.forward(batch, subject.new_pool()).logits
    assert logits is not None
    return logits


@pytest.mark.parametrize("num_ids", [40, 41, 60])
def test_each_arm_is_what_it_is_by_itself_in_any_order(subject: Subject, num_ids: int):
    asked = arms(subject)
    reading = Reading(subject, IDS[:num_ids], 40, {arm.num_skipped for arm in asked})
    found = {id(arm): reading.logits(arm).clone() for arm in [*asked, *reversed(asked)]}
    for arm in asked:
        expected = alone(subject, arm, IDS[:num_ids])
        assert expected.shape[0] == num_ids - 39
        close(found[id(arm)], expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("num_ids", [40, 41, 60])
def test_with_int8_a_shallow_prompt_is_prefill_s_and_all_else_decode_s(tmp_path: Path, family: str, num_ids: int):
    model = tiny_model(family)
    save_tiny(tmp_path, model)
    subject = Subject.load(locate(str(tmp_path)), dtype=torch.float64, max_tokens=64)
    model = exact(model)
    rounded, ids = exact(dequantized(model)), IDS[:num_ids]
    reading = Reading(subject, ids, 40, {0, 3})
    full, shallow = (
        Arm("full, int8", 0, Treatment.FULL, int8=True),
        Arm("shallow, int8", 3, Treatment.SHALLOW, int8=True),
    )
    throughout = replace(shallow, name="shallow, all int8", int8_prompt=True)
    mixed = with_deep_layers_of(rounded, model, 3)  # of what is skipped, a projection is folded as it was read
    for _ in range(2):  # in any order, and none leaves anything behind for another
        close(reading.logits(full), shallow_logits(rounded, rounded, ids, 40, 0))
        close(reading.logits(shallow), shallow_logits(model, rounded, ids, 40, 3))
        close(reading.logits(throughout), shallow_logits(mixed, rounded, ids, 40, 3))
        close(reading.logits(replace(shallow, int8=False)), shallow_logits(model, model, ids, 40, 3))
    assert not torch.allclose(reading.logits(full), reading.full, atol=1e-3)


def test_the_calibrated_arm_is_not_the_paper_s(subject: Subject):
    reading = Reading(subject, IDS, 40, {3})
    shallow, calibrated = (reading.logits(arm) for arm in arms(subject) if arm.treatment is Treatment.SHALLOW
                           and arm.num_skipped == 3 and arm.num_boundary == 1)  # fmt: skip
    assert not torch.allclose(shallow, calibrated, atol=1e-3)
