"""The tensors of one forward: rows of many sequences packed one after the other, without padding.

A row is one token. Attention looks at rows by *segment*, the rows of one sequence; single-row segments (decoding
sequences) are gathered in groups of similar length, because one by one they would cost a kernel launch each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class PromptSegment:
    """Rows ``[row_start, row_end)`` of one sequence: they see its context up to and including themselves.

    ``context`` addresses the slots of the ``num_context`` tokens that they may see, in position order: the last are the
    rows' own. Each sees the last ``window`` (``None``: all) of those up to itself. ``mask`` says the same:
    ``[rows, num_context]`` (True = may look), or ``None`` where plain causality from the first of them on says it all.
    """

    row_start: int
    row_end: int
    context: torch.Tensor | slice
    num_context: int
    window: int | None
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Single rows of ``B`` sequences: ``rows`` ``[B]``, ``context`` slots ``[B * longest]`` (padded with its own last),
    of which each sees the first of ``lengths`` ``[B]``. ``mask`` says the same: ``[B, 1, 1, longest]`` (True = may
    look), or ``None`` where nothing is padded."""

    rows: torch.Tensor
    context: torch.Tensor | slice
    longest: int
    lengths: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How the ``num_rows`` rows that run a layer read the pool, and the ``slots`` ``[num_rows]`` they write.

    ``windowed`` holds, by its window, how layers with a sliding window read instead, where that differs: built once a
    step, and only if some context is longer than the window.
    """

    num_rows: int
    slots: torch.Tensor
    prompts: tuple[PromptSegment, ...]
    groups: tuple[DecodeGroup, ...]
    windowed: Mapping[int, AttentionPlan] = field(default_factory=dict)

    def within(self, window: int | None) -> AttentionPlan:
        """How a layer reads that sees the last ``window`` positions only (``None``: all of them)."""
        return self if window is None else self.windowed.get(window, self)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step's input. ``token_ids`` and ``positions`` are ``[T]`` int64.

    ``kept`` is how all rows run layers ``0..K-1``, ``deep`` how the full-depth rows run the others (``None`` where
    there are none; ``kept`` itself only if no row is shallow). ``shallow_rows`` / ``full_rows`` select rows of each
    depth (``None`` = all of them, an empty tensor = none, a slice = rows that follow one another). ``logit_rows``
    selects, among the full-depth rows, those whose next token is wanted; ``scored_rows`` (``None`` = none) those whose
    states are, so that a prompt's own tokens can be scored in pieces.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    kept: AttentionPlan
    deep: AttentionPlan | None
    shallow_rows: torch.Tensor | slice | None
    full_rows: torch.Tensor | slice | None
    logit_rows: torch.Tensor
    scored_rows: torch.Tensor | None = None
