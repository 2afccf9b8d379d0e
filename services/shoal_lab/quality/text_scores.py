"""What each arm says of how an author went on after a prompt, against full depth, token by token.

The first token of a continuation is read off the boundary token, the others off tokens that follow the prompt: told
apart, because different parts of the method show in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from shoal_lab.quality.arms import Arm
from shoal_lab.quality.reading import Reading
from shoal_lab.quality.statistics import Bootstrap, Interval
from shoal_lab.quality.subject import Subject, Treatment
from shoal_lab.quality.texts import Passage

ALL_KINDS = "all"
# Of each arm and passage: nats of the first token, nats a token of the others; divergence and agreement a token.
Figures = NDArray[np.float64]
_FIRST, _REST, _DIVERGENCE, _AGREEMENT = range(4)


@dataclass(frozen=True, slots=True)
class TextScore:
    """One arm on one kind of text, or on ``all``. Perplexities are per token, of the first token, and of the others.

    ``extra`` is how many nats a token less likely the continuation becomes than at full depth; ``divergence`` the
    Kullback-Leibler divergence of the next token's distribution from full depth's (nats a token); ``agreement`` the
    share of tokens where both have the same likeliest one. ``recovered`` is the share of the paper's loss that a
    calibrated projection undoes (``Bootstrap.recovered``).
    """

    kind: str
    treatment: str
    num_skipped: int
    num_passages: int
    perplexity: Interval
    first_perplexity: Interval
    rest_perplexity: Interval
    extra: Interval
    divergence: Interval
    agreement: Interval
    recovered: Interval | None


def measure_passages(
    subject: Subject, arms: Sequence[Arm], passages: Sequence[Passage], on_progress: Callable[[int, int], None]
) -> Figures:
    """``[arms, passages, 4]``; one full-depth pass a passage. Continuations must have two tokens or more."""
    figures = np.empty((len(arms), len(passages), 4))
    counts = {arm.num_skipped for arm in arms}
    for index, passage in enumerate(passages):
        reading = Reading(subject, passage.prompt + passage.continuation[:-1], len(passage.prompt), counts)
        full = _logprobs(reading.full)
        targets = torch.tensor(passage.continuation, device=full.device)[:, None]
        for row, arm in enumerate(arms):
            figures[row, index] = _figures(full, _logprobs(reading.logits(arm)), targets)
        on_progress(index + 1, len(passages))
    return figures


def score_texts(arms: Sequence[Arm], figures: Mapping[str, Figures], num_tokens: int, *, seed: int) -> list[TextScore]:
    """``figures`` by kind of text, whose continuations have ``num_tokens`` each; ``all`` weighs passages alike."""
    scores = [score for kind, found in figures.items() for score in _of_kind(kind, arms, [found], num_tokens, seed)]
    return scores + (_of_kind(ALL_KINDS, arms, list(figures.values()), num_tokens, seed) if len(figures) > 1 else [])


def _of_kind(kind: str, arms: Sequence[Arm], parts: Sequence[Figures], num_tokens: int, seed: int) -> list[TextScore]:
    bootstrap = Bootstrap([part.shape[1] for part in parts], seed=seed)
    figures = np.concatenate(parts, axis=1)
    nats = (figures[..., _FIRST] + (num_tokens - 1) * figures[..., _REST]) / num_tokens
    papers = {arm.num_skipped: row for arm, row in zip(arms, nats, strict=True) if arm.is_paper}

    def perplexity(column: NDArray[np.float64]) -> Interval:
        return bootstrap.interval(np.exp, column)

    return [
        TextScore(
            kind, arm.name, arm.num_skipped, bootstrap.num_units,
            perplexity=perplexity(nats[row]),
            first_perplexity=perplexity(own[:, _FIRST]),
            rest_perplexity=perplexity(own[:, _REST]),
            extra=bootstrap.difference(nats[row], nats[0]),
            divergence=bootstrap.mean(own[:, _DIVERGENCE]),
            agreement=bootstrap.mean(own[:, _AGREEMENT]),
            recovered=bootstrap.recovered(nats[0], papers[arm.num_skipped], nats[row])
            if arm.treatment is Treatment.SHALLOW and not arm.is_paper else None,
        )
        for row, (arm, own) in enumerate(zip(arms, figures, strict=True))
    ]  # fmt: skip


def _figures(full: torch.Tensor, own: torch.Tensor, targets: torch.Tensor) -> tuple[float, ...]:
    """``full`` and ``own`` are log-probabilities ``[tokens, vocab]``, ``targets`` ``[tokens, 1]``."""
    nats = -own.gather(1, targets).double()
    divergence = torch.nn.functional.kl_div(own, full, reduction="none", log_target=True).sum(dim=-1).mean()
    agreement = (own.argmax(dim=-1) == full.argmax(dim=-1)).double().mean()
    return nats[0].item(), nats[1:].mean().item(), divergence.item(), agreement.item()


def _logprobs(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
