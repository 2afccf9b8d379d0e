"""From a plain-Python step plan to tensors, through the decoder, and back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from shoal.engine.reads import ReadPlanner
from shoal.engine.scheduler import ScheduledRows, StepPlan
from shoal.kv.pool import KvPool
from shoal.model.batch import StepBatch
from shoal.model.decoder import Decoder


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """K/V of tokens ``[start, end)`` of one prompt, ready to ship.

    ``shallow`` is ``[K, tokens, 2, kv_heads, head_dim]``; ``deep`` is the same for the skipped layers, projected, or
    ``None`` where nothing is skipped. Both are contiguous copies on the host.
    """

    request_id: str
    start: int
    end: int
    shallow: torch.Tensor
    deep: torch.Tensor | None


class Runner:
    """Builds the tensors of a step and runs it."""

    def __init__(self, decoder: Decoder, pool: KvPool) -> None:
        self.decoder = decoder
        self.pool = pool
        self._device = decoder.parameters.embedding.device
        self.reads = ReadPlanner(pool.layout, self._device, decoder.spec.windows)

    def run(self, plan: StepPlan) -> tuple[torch.Tensor | None, list[PrefillChunk]]:
        """Logits ``[completing sequences, vocab]`` in the order of ``plan.rows``, and what is to be shipped."""
        self.pool.copy_blocks(plan.copies)
        rows = plan.rows
        tensors = self.decoder.forward(self.batch(rows), self.pool)
        return tensors.logits, list(self._chunks(rows, tensors.projected))

    def batch(self, rows: tuple[ScheduledRows, ...]) -> StepBatch:
        """The tensors of a step; logits are wanted of the last row of each sequence that it completes."""
        token_ids: list[int] = []
        positions: list[int] = []
        shallow: list[int] = []
        full: list[int] = []
        wanted: list[int] = []
        deep: list[ScheduledRows] = []
        for item in rows:
            offset = len(positions)
            sequence = item.sequence
            token_ids += sequence.token_ids(item.start, item.end)
            positions += range(item.start, item.end)
            first_full = min(max(sequence.num_shallow, item.start), item.end)
            shallow += range(offset, offset + first_full - item.start)
            full += range(offset + first_full - item.start, offset + item.num_rows)
            if first_full < item.end:
                deep.append(ScheduledRows(sequence, first_full, item.end))
                if item.completes and sequence.sampled:
                    wanted.append(len(full) - 1)
        kept = self.reads.plan(rows)
        mixed = bool(shallow)
        # Layers that nobody skips (or a stage that has none) need no second reading plan.
        has_deep = bool(deep) and bool(self.decoder.plan.num_skipped)
        return StepBatch(
            token_ids=self._index(token_ids),
            positions=self._index(positions),
            kept=kept,
            deep=(self.reads.plan(deep) if mixed else kept) if has_deep else None,
            shallow_rows=self._index(shallow) if full else None,
            full_rows=self._index(full) if mixed else None,
            logit_rows=self._index(wanted),
        )

    def _index(self, values: list[int] | npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int64, device=self._device)

    def _chunks(self, rows: tuple[ScheduledRows, ...], projected: torch.Tensor | None) -> Iterable[PrefillChunk]:
        """What prefill ships of this step: kept layers read back from the pool, skipped ones as projected."""
        offset = 0
        for item in rows:
            if item.sequence.sampled:
                continue
            slots = self._index(self.pool.layout.slots(item.sequence.blocks, item.start, item.end))
            deep = None
            if projected is not None:
                deep = projected[:, offset : offset + item.num_rows].to(self.pool.dtype).contiguous().cpu()
                offset += item.num_rows
            shallow = self.pool.read_layers(0, self.decoder.plan.num_kept, slots).cpu()
            yield PrefillChunk(item.sequence.request_id, item.start, item.end, shallow, deep)
