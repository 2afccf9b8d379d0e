"""What is compared: each arm is one treatment at one number of skipped layers, and a row of every table.

A new treatment is a member of ``Treatment`` that ``Reading`` knows how to go on with, and a line in ``arms_of``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shoal.errors import ConfigError
from shoal.model.files import ModelFiles
from shoal.model.plan import Anchors, LayerPlan
from shoal.model.projection import KvProjection
from shoal.model.projector import PAPER, Projector, find_projector, load_projector, read_header, require_model
from shoal_lab.quality.subject import Subject, Treatment

CALIBRATED = "calibrated"
_CONTROLS = (Treatment.NO_PROJECTION, Treatment.NO_BOUNDARY, Treatment.REMOVED)


@dataclass(frozen=True, slots=True)
class Arm:
    """``name`` is its treatment's in reports; ``projection`` stands for the paper's where it's ``calibrated``.

    ``num_boundary`` tokens at the prompt's end are full depth. With ``int8``, decode holds its weights so, which
    computes what is full depth; prefill, which encodes a shallow prompt, does where ``int8_prompt`` says so.
    """

    name: str
    num_skipped: int
    treatment: Treatment
    projection: KvProjection | None = None
    num_boundary: int = 1
    int8: bool = False
    int8_prompt: bool = False

    @property
    def is_paper(self) -> bool:
        """Whether it's what the paper serves: what others are to recover the loss of."""
        is_plain = self.projection is None and self.num_boundary == 1 and not self.int8
        return self.treatment is Treatment.SHALLOW and is_plain

    def plan(self, num_layers: int) -> LayerPlan:
        anchors = Anchors() if self.treatment is Treatment.SPEED else None
        return LayerPlan(num_layers, self.num_skipped, self.num_boundary, anchors)


FULL = Arm("full", 0, Treatment.FULL)


def arms_of(
    subject: Subject,
    counts: Sequence[int],
    projectors: Mapping[int, Projector],
    boundaries: Sequence[int] = (),
    *,
    controls: bool = True,
    int8: bool = False,
) -> list[Arm]:
    """Full depth first; then for each number of skipped layers the paper's projection and, where there is a projector,
    the calibrated one.

    With the first number alone come both with each of ``boundaries`` full-depth tokens at the prompt's end, and, if
    ``controls`` are wanted, SPEED (which an untuned model fails as well) and the negative controls. SPEED needs skipped
    layers without a sliding window. ``int8`` adds decode's weights in int8, for full depth and both, and
    both with those of prefill, too.
    """
    arms = [FULL]
    for count in counts:
        served = [Arm(Treatment.SHALLOW.value, count, Treatment.SHALLOW)]
        if count in projectors:
            paper = subject.projection(count)
            weight, num_sinks = projectors[count].weight.to(paper.weight), projectors[count].header.num_sinks
            served.append(Arm(CALIBRATED, count, Treatment.SHALLOW, paper.replaced(weight, num_sinks)))
        arms += served
        if count == counts[0]:
            arms += [
                replace(arm, name=f"{arm.name}, {number} boundary", num_boundary=number)
                for number in boundaries for arm in served
            ]  # fmt: skip
            if int8:
                arms += [replace(arm, name=f"{arm.name}, int8", int8=True) for arm in (FULL, *served)]
                arms += [replace(arm, name=f"{arm.name}, all int8", int8=True, int8_prompt=True) for arm in served]
            arms += _controls(subject, count) if controls else []
    return arms


def _controls(subject: Subject, count: int) -> list[Arm]:
    skipped = subject.spec.layers[subject.spec.num_layers - count :]
    speed = [Treatment.SPEED] if all(layer.window is None for layer in skipped) else []
    return [Arm(treatment.value, count, treatment) for treatment in (*speed, *_CONTROLS)]


def find_projectors(wanted: str, files: ModelFiles, counts: Sequence[int], num_layers: int) -> dict[int, Projector]:
    """By number of skipped layers: those beside the model, over them the one at the path ``wanted``, if it's one.

    ``paper`` wants none at all. Raises ModelError, or ConfigError if the one wanted is of a number not asked for.
    """
    require_model(wanted, files)
    plans = {count: LayerPlan(num_layers, count) for count in counts}
    found: dict[int, Projector | None] = {}
    if wanted not in {PAPER, "auto"}:
        path = Path(wanted).expanduser()
        count = read_header(path).num_skipped
        if count not in plans:
            raise ConfigError(f"{path} skips {count} layers, which isn't evaluated: say --skip-layers {count}")
        found[count] = load_projector(path, files, plans.pop(count))
    found |= {n: find_projector(PAPER if wanted == PAPER else "auto", files, plan) for n, plan in plans.items()}
    return {count: projector for count in counts if (projector := found[count]) is not None}
