"""How long a prompt takes until its first token can be chosen, at full depth and with layers skipped.

In one process, the boundary token fused into the prompt's last step: what skipping saves in arithmetic on this machine,
without what serving adds to both (queues, the hand-off).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from shoal.model.plan import LayerPlan
from shoal.quality.subject import Subject

NUM_ROUNDS = 7


@dataclass(frozen=True, slots=True)
class PrefillTime:
    """Medians over the rounds; ``speed_up`` is full depth's median divided by this one."""

    num_skipped: int
    median_s: float
    speed_up: float


def measure_prefill(
    subject: Subject, prompt: Sequence[int], counts: Sequence[int], on_progress: Callable[[int, int], None]
) -> list[PrefillTime]:
    """Full depth (0 skipped) first, then ``counts``; one after the other in every round, so that whatever else the
    machine does meets them alike. A first round is thrown away."""
    forwards = {count: _forward(subject, prompt, count) for count in (0, *counts)}
    rounds = []
    for index in range(NUM_ROUNDS + 1):
        rounds.append({count: _timed(forward, subject.pool.layers[0].device) for count, forward in forwards.items()})
        on_progress(index + 1, NUM_ROUNDS + 1)
    medians = {count: statistics.median(times[count] for times in rounds[1:]) for count in forwards}
    return [PrefillTime(count, median, medians[0] / median) for count, median in medians.items()]


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
