"""What a shallow prompt costs on given responses, compared with full depth token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shoal_lab.quality.arms import Arm
from shoal_lab.quality.prompts import Prompt
from shoal_lab.quality.reading import Reading
from shoal_lab.quality.subject import Subject, Treatment


@dataclass(frozen=True, slots=True)
class Estimate:
    """Nats a response token, and the standard error over the responses."""

    mean: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class Loss:
    """``divergence`` is the Kullback-Leibler divergence of the shallow plan from full depth, ``extra`` the rise of
    the responses' own negative log-likelihood. Where the model drew the responses, their expectations are equal, and
    the divergence has the smaller error.
    """

    divergence: Estimate
    extra: Estimate


def measure_losses(
    subject: Subject,
    texts: Sequence[tuple[Prompt, tuple[int, ...]]],
    candidates: Sequence[int],
    on_progress: Callable[[int, int], None],
) -> list[Loss]:
    """One loss for each number of skipped layers, over all ``texts`` (prompt, response)."""
    sums = np.empty((len(candidates), 2, len(texts)))
    for index, (prompt, response) in enumerate(texts):
        ids, targets = [*prompt, *response[:-1]], torch.tensor([response]).T
        reading = Reading(subject, ids, len(prompt), candidates)
        full = _logprobs(reading.full)
        for row, num_skipped in enumerate(candidates):
            fall = full - _logprobs(reading.logits(Arm(Treatment.SHALLOW.value, num_skipped, Treatment.SHALLOW)))
            sums[row, 0, index] = float((full.exp() * fall).sum())
            sums[row, 1, index] = float(fall.gather(1, targets.to(fall.device)).sum())
        on_progress(index + 1, len(texts))
    lengths = np.array([len(response) for _, response in texts])
    return [Loss(_per_token(divergence, lengths), _per_token(extra, lengths)) for divergence, extra in sums]


def _logprobs(logits: torch.Tensor) -> torch.Tensor:
    return logits.double().log_softmax(dim=-1)


def _per_token(sums: np.ndarray, lengths: np.ndarray) -> Estimate:
    """All nats over all tokens; the error is that of a ratio of two means, to first order."""
    mean = sums.sum() / lengths.sum()
    residual = sums - mean * lengths
    error = residual.std(ddof=1) / len(sums) ** 0.5 / lengths.mean()
    return Estimate(float(mean), float(error))
