"""Whether each arm that is served does as it's told (instructions.py), in greedy answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shoal.errors import ConfigError
from shoal_lab.quality.answers import greedy_answers
from shoal_lab.quality.arms import Arm
from shoal_lab.quality.instructions import Instruction
from shoal_lab.quality.statistics import Bootstrap, Interval
from shoal_lab.quality.subject import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class InstructionScore:
    """``passed`` is the mean share of an instruction's checks that pass, ``difference`` that share less full depth's,
    paired; ``followed`` the share of instructions of which all checks pass."""

    treatment: str
    num_skipped: int
    num_instructions: int
    passed: Interval
    followed: Interval
    difference: Interval


def instruction_prompts(
    tokenizer: PreTrainedTokenizerFast, instructions: Sequence[Instruction]
) -> list[tuple[int, ...]]:
    """Each as a user's message. Raises ConfigError where the model has no chat template to put it in."""
    if not tokenizer.chat_template:
        raise ConfigError("this model has no chat template to instruct it with: leave instructions out of --tasks")
    return [_chat(tokenizer, instruction.prompt) for instruction in instructions]


def _chat(tokenizer: PreTrainedTokenizerFast, prompt: str) -> tuple[int, ...]:
    asked = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer.encode(str(text), add_special_tokens=False))


def score_instructions(
    subject: Subject,
    arms: Sequence[Arm],
    instructions: Sequence[Instruction],
    *,
    max_tokens: int,
    seed: int,
    on_progress: Callable[[int, int], None],
) -> list[InstructionScore]:
    """One score for each of ``arms`` that is served, full depth's first. Raises ConfigError."""
    tokenizer = subject.files.tokenizer()
    prompts = instruction_prompts(tokenizer, instructions)
    served = [arm for arm in arms if arm.is_served]
    total = len(served) * len(prompts)
    shares = np.empty((len(served), len(prompts)))
    for row, arm in enumerate(served):
        answers = greedy_answers(
            subject, arm, prompts, max_tokens=max_tokens,
            on_progress=lambda done, row=row: on_progress(row * len(prompts) + done, total),  # type: ignore[misc]
        )  # fmt: skip
        texts = tokenizer.batch_decode([list(answer) for answer in answers], skip_special_tokens=True)
        shares[row] = [one.score(text) for one, text in zip(instructions, texts, strict=True)]
    bootstrap = Bootstrap([len(prompts)], seed=seed)
    return [
        InstructionScore(
            arm.name, arm.num_skipped, len(prompts),
            bootstrap.mean(own), bootstrap.mean((own == 1).astype(np.float64)), bootstrap.difference(own, shares[0]),
        )
        for arm, own in zip(served, shares, strict=True)
    ]  # fmt: skip
