"""One full-depth pass serves every arm: its logits are those of the arm run by itself."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from models import save_tiny, tiny_model
from shoal.model.files import locate
from shoal.quality.arms import CALIBRATED, FULL, Arm
from shoal.quality.reading import Reading
from shoal.quality.subject import Subject, Treatment

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
    return [FULL, *shallow, *(Arm(one, 3, one) for one in CONTROLS), Arm(CALIBRATED, 3, Treatment.SHALLOW, other)]


@pytest.mark.parametrize("num_ids", [40, 41, 60])
def test_each_arm_is_what_it_is_by_itself_in_any_order(subject: Subject, num_ids: int):
    asked = arms(subject)
    reading = Reading(subject, IDS[:num_ids], 40, {arm.num_skipped for arm in asked})
    found = {id(arm): reading.logits(arm).clone() for arm in [*asked, *reversed(asked)]}
    for arm in asked:
        alone = subject.logits(IDS[:num_ids], 40, arm.treatment, num_skipped=arm.num_skipped, projection=arm.projection)
        assert alone.shape[0] == num_ids - 39
        close(found[id(arm)], alone)


def test_the_calibrated_arm_is_not_the_paper_s(subject: Subject):
    reading = Reading(subject, IDS, 40, {3})
    shallow, calibrated = (reading.logits(arm) for arm in arms(subject) if arm.treatment is Treatment.SHALLOW
                           and arm.num_skipped == 3)  # fmt: skip
    assert not torch.allclose(shallow, calibrated, atol=1e-3)
