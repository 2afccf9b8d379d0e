"""How long a prompt takes until its first token can be chosen, at full depth and with layers skipped.

In one process, the boundary token fused into the prompt's last step: what skipping saves in arithmetic on this machine,
without what serving adds to both (queues, the hand-off).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from shoal.model.plan import LayerPlan
from shoal_lab.quality.statistics import Column, Interval, ratio_of_medians
from shoal_lab.quality.subject import Subject

NUM_ROUNDS = 11


@dataclass(frozen=True, slots=True)
class PrefillTime:
    """Medians over the rounds; ``speed_up`` is full depth's median divided by this one.

    ``interval`` is the speed-up's over the rounds of this run, in pairs; another run may lie outside of it. Full depth
    has none.
    """

    num_skipped: int
    median_s: float
    speed_up: float
    interval: Interval | None = None


def measure_prefill(
    subject: Subject,
    prompt: Sequence[int],
    counts: Sequence[int],
    on_progress: Callable[[int, int], None],
    *,
    seed: int = 0,
) -> list[PrefillTime]:
    """Full depth (0 skipped) first, then ``counts``; one after the other in every round, so that whatever else the
    machine does meets them alike. A first round is thrown away."""
    forwards = {count: _forward(subject, prompt, count) for count in (0, *counts)}
    rounds = []
    for index in range(NUM_ROUNDS + 1):
        rounds.append({count: _timed(forward, subject.pool.layers[0].device) for count, forward in forwards.items()})
        on_progress(index + 1, NUM_ROUNDS + 1)
    return summarize({count: np.array([times[count] for times in rounds[1:]]) for count in forwards}, seed=seed)


def summarize(times_s: Mapping[int, Column], *, seed: int) -> list[PrefillTime]:
    """Of each number of skipped layers, 0 among them, the seconds of each round."""
    found = []
    for count, own in times_s.items():
        ratio = ratio_of_medians(times_s[0], own, seed=seed)
        found.append(PrefillTime(count, float(np.median(own)), ratio.value, ratio if count else None))
    return found


@torch.no_grad()
def _forward(subject: Subject, prompt: Sequence[int], num_skipped: int) -> Callable[[], object]:
    plan = LayerPlan(subject.spec.num_layers, num_skipped)
    projection = subject.projection(num_skipped) if num_skipped else None
    parameters = replace(subject.parameters, projection=projection)
    shallow = range(len(prompt) - 1 if num_skipped else 0)
    decoder, batch = subject.step(plan, parameters, prompt, len(prompt), shallow)
    return lambda: decoder.forward(batch, subject.pool)


def _timed(forward: Callable[[], object], device: torch.device) -> float:
    _finish(device)
    started_s = time.perf_counter()
    forward()
    _finish(device)
    return time.perf_counter() - started_s


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
