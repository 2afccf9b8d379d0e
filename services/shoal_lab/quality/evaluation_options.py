"""What ``shoal eval`` is asked for, and what of it can be refused before anything is read."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from shoal.errors import ConfigError
from shoal_lab.quality.retrieval import LENGTHS
from shoal_lab.quality.texts import Kind

_PASSAGES_PER_GREEDY_ANSWER = 8


class Task(enum.StrEnum):
    """What is measured. Prefill is timed with ``text``, for the plot of loss against speed-up."""

    TEXT = "text"
    GREEDY = "greedy"
    RETRIEVAL = "retrieval"


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """``skip_layers`` are numbers of skipped layers, by default a third of the layers.

    With the first come ``boundary_tokens``, numbers of full-depth tokens at the prompt's end, besides 1; if
    ``controls`` says so, SPEED and the negative controls; and if ``int8`` does, weights in int8, decode's and both
    pools'. ``projector`` is a path, ``paper``, or ``auto``. ``data`` stands for the shipped ``kinds``. ``num_passages``
    are of each kind of text, ``num_cases`` of each length and depth of retrieval; ``greedy_tokens`` are the
    longest answer's.
    """

    skip_layers: tuple[int, ...] = ()
    boundary_tokens: tuple[int, ...] = ()
    controls: bool = True
    int8: bool = False
    projector: str = "auto"
    data: tuple[Path, ...] = ()
    kinds: tuple[Kind, ...] = tuple(Kind)
    tasks: tuple[Task, ...] = tuple(Task)
    num_passages: int = 200
    num_cases: int = 25
    prompt_tokens: int = 512
    continuation_tokens: int = 128
    greedy_tokens: int = 64
    retrieval_lengths: tuple[int, ...] = LENGTHS
    seed: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))

    @property
    def num_greedy(self) -> int:
        """Answers a kind of text."""
        return max(2, self.num_passages // _PASSAGES_PER_GREEDY_ANSWER)


def checked(
    options: EvaluationOptions, counts: Sequence[int], num_layers: int, max_context_tokens: int
) -> EvaluationOptions:
    """Raises ConfigError."""
    for count in counts:
        if not 1 <= count < num_layers:
            raise ConfigError(
                f"--skip-layers has {count}, this model {num_layers} layers: choose 1 to {num_layers - 1}"
            )
    if any(not 1 < number < options.prompt_tokens for number in options.boundary_tokens):
        raise ConfigError(f"--boundary-tokens: choose 2 to {options.prompt_tokens - 1}, for prompts of --prompt-tokens")
    if len(set(options.boundary_tokens)) < len(options.boundary_tokens):
        raise ConfigError("--boundary-tokens names a number twice: name each once")
    if len(set(counts)) < len(counts):
        raise ConfigError("--skip-layers names a number twice: name each once")
    if options.num_passages < 2:
        raise ConfigError(f"{options.num_passages} passages tell no interval: ask for 2 or more")
    if options.num_cases < 2:
        raise ConfigError(f"{options.num_cases} retrieval cases tell no interval: ask for 2 or more")
    if options.prompt_tokens < 2 or options.continuation_tokens < 2:
        raise ConfigError("prompts and continuations need 2 tokens or more")
    longest = options.prompt_tokens + max(options.continuation_tokens, options.greedy_tokens)
    if longest > max_context_tokens:
        raise ConfigError(f"passages take {longest} tokens, the model {max_context_tokens}: lower --prompt-tokens")
    return replace(options, skip_layers=tuple(counts))
