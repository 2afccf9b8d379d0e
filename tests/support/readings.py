"""What a model says of given text under one treatment, for tests that compare one at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shoal_lab.quality.arms import Arm
from shoal_lab.quality.reading import Reading
from shoal_lab.quality.subject import Subject, Treatment


def logits_of_text(
    subject: Subject, ids: Sequence[int], num_prompt_tokens: int, treatment: Treatment, num_skipped: int = 1
) -> torch.Tensor:
    """``[len(ids) - N + 1, vocab]`` after each of the tokens ``N-1..``."""
    return Reading(subject, ids, num_prompt_tokens, {num_skipped}).logits(Arm(treatment, num_skipped, treatment))
