"""Which slots of the pool the rows of a step read, layer kind by layer kind.

A step's rows are the same in all layers; what they see is not. Layers that see everything share one plan; layers with a
sliding window read the last ``window`` positions of each row only, and share another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from shoal.model.batch import AttentionPlan, DecodeGroup, PromptSegment
from shoal.model.kv_layout import KvLayout


@dataclass(frozen=True, slots=True)
class Span:
    """Rows of one sequence, and what they see: its ``blocks``, at indices ``[start, end)`` the rows themselves."""

    blocks: Sequence[int]
    start: int
    end: int

    @property
    def num_rows(self) -> int:
        return self.end - self.start


class ReadPlanner:
    """Plans reads of a pool with ``layout`` for a model whose layers have the given ``windows``."""

    def __init__(self, layout: KvLayout, device: torch.device, windows: Iterable[int] = ()) -> None:
        self._layout = layout
        self._device = device
        self._windows = sorted(windows)

    def plan(self, rows: Sequence[Span]) -> AttentionPlan:
        """How ``rows`` read and write; each sees all that comes before it in its sequence's blocks."""
        written = self._written(rows)
        longest = max(item.end for item in rows)
        windowed = {window: self._view(rows, written, window) for window in self._windows if window < longest}
        return self._view(rows, written, None, windowed)

    def _written(self, rows: Sequence[Span]) -> torch.Tensor:
        """The slots of the rows themselves."""
        if all(item.num_rows == 1 for item in rows):
            return self._index([self._layout.slot(item.blocks, item.start) for item in rows])
        return self._index(np.concatenate([self._layout.slots(item.blocks, item.start, item.end) for item in rows]))

    def _view(
        self,
        rows: Sequence[Span],
        written: torch.Tensor,
        window: int | None,
        windowed: dict[int, AttentionPlan] | None = None,
    ) -> AttentionPlan:
        prompts: list[PromptSegment] = []
        singles: list[tuple[int, Span]] = []
        offset = 0
        for item in rows:
            if item.num_rows == 1:
                singles.append((offset, item))
            else:
                prompts += self._segments(offset, item, window)
            offset += item.num_rows
        groups = tuple(self._groups(singles, window))
        return AttentionPlan(offset, written, tuple(prompts), groups, windowed or {})

    def _segments(self, offset: int, item: Span, window: int | None) -> Iterable[PromptSegment]:
        """One segment, or with a window pieces as long as the window, so that each reads little that it masks."""
        for start in range(item.start, item.end, window or item.num_rows):
            end = min(item.end, start + (window or item.num_rows))
            seen = _first_seen(start, window)
            row = offset + start - item.start
            context = self._context(self._layout.slots(item.blocks, seen, end))
            mask = self._mask(start - seen, end - start, window)
            yield PromptSegment(row, row + end - start, context, end - seen, window, mask)

    def _mask(self, num_before: int, num_rows: int, window: int | None) -> torch.Tensor | None:
        """Of rows that follow ``num_before`` positions; none is longer than a window."""
        if not num_before:
            return None
        mask = torch.ones(num_rows, num_before + num_rows, dtype=torch.bool, device=self._device).tril(num_before)
        return mask if window is None else mask.triu(num_before - window + 1)

    def _groups(self, singles: list[tuple[int, Span]], window: int | None) -> Iterable[DecodeGroup]:
        """Sequences that see a like number of tokens (within a factor of two) together: little padding."""
        by_length: dict[int, list[tuple[int, npt.NDArray[np.int64]]]] = {}
        for row, item in singles:
            slots = self._layout.slots(item.blocks, _first_seen(item.start, window), item.end)
            by_length.setdefault(len(slots).bit_length(), []).append((row, slots))
        for members in by_length.values():
            lengths = [len(slots) for _, slots in members]
            longest = max(lengths)
            context = np.empty((len(members), longest), dtype=np.int64)
            for index, (_, slots) in enumerate(members):
                context[index, : len(slots)] = slots
                # Nobody else's: what isn't to be seen counts by zero, and zero times what is no number is none.
                context[index, len(slots) :] = slots[-1]
            limits = self._index(lengths)
            mask = None
            if min(lengths) < longest:
                mask = (torch.arange(longest, device=self._device) < limits[:, None])[:, None, None, :]
            rows = self._index([row for row, _ in members])
            yield DecodeGroup(rows, self._context(context.reshape(-1)), longest, limits, mask)

    def _context(self, slots: npt.NDArray[np.int64]) -> torch.Tensor | slice:
        """A slice where the slots lie in one run, which saves the gather."""
        first, last = int(slots[0]), int(slots[-1])
        in_one_run = last - first == len(slots) - 1 and bool((np.diff(slots) == 1).all())
        return slice(first, last + 1) if in_one_run else self._index(slots)

    def _index(self, values: list[int] | npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int64, device=self._device)


def _first_seen(position: int, window: int | None) -> int:
    """The first position that the row at ``position`` may look at."""
    return 0 if window is None else max(0, position - window + 1)
