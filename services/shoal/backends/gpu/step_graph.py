"""Steps that only decode, recorded once for each size and replayed from then on.

A GPU gets such a step as a thousand small operations, and at few sequences waits for Python before each. A graph
(CUDA's: backends/gpu/cuda_graph.py) starts them all at once; but it runs what was recorded, on the memory that it was
recorded on. So all that differs from step to step lies in one matrix, which each step fills anew::

    a row of a sequence   token | tokens seen | its blocks ........ | seen in deep layers | its deep blocks ..
    a row of nobody       0     | 1           | the spare block ... | 1                   | the spare one ....

The last two columns are there where deep layers have blocks of their own. Which slots are read and written, what is
masked and at which position a token stands is computed from it on the device. Sizes come in steps, so that graphs are
few, and what a step lacks is filled up with rows of nobody: they see and write the pool's spare slot alone.

Graphs are captured when a size first comes. There are too many sizes to capture all before a replica is ready, of
which a load uses few; each costs the time of a few steps, once. The first is captured by the warm-up.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch

from shoal.errors import InternalError
from shoal.model.batch import AttentionPlan, DecodeGroup, StepBatch
from shoal.model.decoder import Decoder
from shoal.model.kv_pool import KvPool

if TYPE_CHECKING:
    from shoal.engine.scheduler import ScheduledRows

_log = logging.getLogger(__name__)

MAX_GRAPHS = 48
"""Each takes some megabytes of the device; the one that wasn't used for the longest time goes."""
_LEAST_CONTEXT = 256
MOST_INDEXED = 1 << 22
"""Rows times tokens that each sees: which slots these are in is worked out in a few integers for each."""


class Graph(Protocol):
    """What is recorded once, and then runs without Python."""

    def capture(self, run: Callable[[], None]) -> None:
        """Record what ``run`` does to tensors, calling it as often as that takes. Raises RuntimeError if it can't."""

    def replay(self) -> None:
        """Do it again: the same operations on the same memory, whatever is in it now."""


@dataclass(frozen=True, slots=True)
class StepSize:
    """``rows``, of which each sees up to ``context`` tokens; ``deep_context`` in deep layers that have blocks of their
    own, else 0."""

    rows: int
    context: int
    deep_context: int = 0


def round_rows(num_rows: int) -> int:
    """1, 2, 4, 8, then multiples of 8."""
    return -(-num_rows // 8) * 8 if num_rows > 8 else 1 << (num_rows - 1).bit_length()


def round_context(num_tokens: int) -> int:
    """Multiples of 256, or of an eighth of the next power of two if that's more: from 1,024 on, at most a quarter more
    is read than there is."""
    step = max(_LEAST_CONTEXT, (1 << (num_tokens - 1).bit_length()) // 8)
    return -(-num_tokens // step) * step


def is_wasteful(size: StepSize, num_seen: int) -> bool:
    """Whether more than twice the ``num_seen`` tokens that rows see would be read, and more than a few: a graph fills
    all rows up to the longest, whose like the eager step reads together, and it keeps the memory for that."""
    return size.rows * size.context > max(2 * num_seen, size.rows * 2 * _LEAST_CONTEXT)


class StepGraphs:
    """Carries out ``DecodePath`` (engine/runner.py), by graphs that ``new_graph`` makes, of at most ``max_rows`` rows.

    ``reads_padding``: attention reads each row's context up to the longest. Raises InternalError if ``pool`` has no
    spare slot.
    """

    def __init__(
        self,
        decoder: Decoder,
        pool: KvPool,
        new_graph: Callable[[], Graph],
        max_rows: int,
        *,
        reads_padding: bool = True,
    ) -> None:
        if not pool.has_spare_slot:
            raise InternalError("steps that are filled up need a pool with a spare slot")
        self._decoder = decoder
        self._pool = pool
        self._new_graph = new_graph
        self._max_rows = max_rows
        self._reads_padding = reads_padding
        self._too_large: set[StepSize] = set()
        self._steps: OrderedDict[StepSize, RecordedStep] = OrderedDict()
        self._may_capture = True
        # One for all graphs: of a large vocabulary each would hold megabytes.
        self._logits = torch.empty(
            max_rows, decoder.spec.vocab_size, dtype=decoder.dtype, device=decoder.parameters.embedding.device
        )

    @property
    def sizes(self) -> list[StepSize]:
        """Of the graphs that there are, the one used last at the end."""
        return list(self._steps)

    def run(self, rows: Sequence[ScheduledRows]) -> torch.Tensor | None:
        """Logits ``[len(rows), vocab]``, which hold until the next call; K/V are in the pool then. ``None``: it's no
        step for a graph, and nothing was done."""
        if not self.takes(rows):
            return None
        size = self.size_of(rows)
        if size.rows * size.context > MOST_INDEXED:
            return None
        if self._reads_padding and is_wasteful(size, sum(item.end for item in rows)):
            return None
        step = self._steps.get(size) or self._capture(size)
        if step is None:
            return None
        self._steps.move_to_end(size)
        step.run(rows)
        self._decoder.progressed()  # while the device computes
        return self._logits[: len(rows)]

    def takes(self, rows: Sequence[ScheduledRows]) -> bool:
        """Whether each of ``rows`` only goes on, and there are no more than a graph has."""
        return 0 < len(rows) <= self._max_rows and all(item.goes_on for item in rows)

    def size_of(self, rows: Sequence[ScheduledRows]) -> StepSize:
        """What ``rows`` are filled up to."""
        num_rows = min(round_rows(len(rows)), self._max_rows)
        context = round_context(max(item.end for item in rows))
        if self._pool.layout.apart is None:
            return StepSize(num_rows, context)
        return StepSize(num_rows, context, round_context(max(item.sequence.num_full_before(item.end) for item in rows)))

    def _capture(self, size: StepSize) -> RecordedStep | None:
        """``None`` if it can't be. That size isn't tried again if there is no room for it; for another reason, only
        sizes that were captured before run by graphs from then on."""
        if not self._may_capture or size in self._too_large:
            return None
        try:
            step = RecordedStep(self._decoder, self._pool, size, self._logits[: size.rows], self._new_graph())
        except torch.OutOfMemoryError as error:
            self._too_large.add(size)
            _log.warning("no graph of %s, whose operations are started one by one: %s", size, error)
            return None
        except RuntimeError as error:
            self._may_capture = False
            _log.warning("no more graphs of decode steps, operations are started one by one: %s", error)
            return None
        if len(self._steps) >= MAX_GRAPHS:
            self._steps.popitem(last=False)
        self._steps[size] = step
        return step


class RecordedStep:
    """The step of one size: its inputs, and a graph that makes ``logits`` ``[rows, vocab]`` of them.

    Captured with rows of nobody alone, so that capturing may run it as often as it likes.
    """

    def __init__(self, decoder: Decoder, pool: KvPool, size: StepSize, logits: torch.Tensor, graph: Graph) -> None:
        self._decoder = decoder
        self._pool = pool
        self._size = size
        self._logits = logits
        self._graph = graph
        layout = pool.layout
        self._num_blocks = layout.num_blocks_for(size.context)
        num_deep_blocks = layout.num_blocks_for(size.deep_context)
        of_nobody = [0, 1, *[pool.num_blocks] * self._num_blocks]
        if size.deep_context:
            of_nobody += [1, *[pool.num_deep_blocks] * num_deep_blocks]
        self._of_nobody = np.array(of_nobody, dtype=np.int64)
        self._inputs = torch.empty(size.rows, len(of_nobody), dtype=torch.int64, device=logits.device)
        self._fill(())
        graph.capture(self._forward)

    def run(self, rows: Sequence[ScheduledRows]) -> None:
        self._fill(rows)
        self._graph.replay()

    def _fill(self, rows: Sequence[ScheduledRows]) -> None:
        """One copy to the device, which waits for nothing: pinned memory is used again only once it was read."""
        host = torch.empty(self._inputs.shape, dtype=torch.int64, pin_memory=self._inputs.is_cuda)
        cells = host.numpy()
        cells[:] = self._of_nobody
        for row, item in zip(cells, rows, strict=False):
            sequence = item.sequence
            row[0] = sequence.last_token_id
            self._enter(row[1:], sequence.blocks, item.end)
            if self._size.deep_context:
                deep = row[2 + self._num_blocks :]
                self._enter(deep, sequence.deep_blocks, sequence.num_full_before(item.end))
        self._inputs.copy_(host, non_blocking=True)

    def _enter(self, cells: npt.NDArray[np.int64], blocks: Sequence[int], num_seen: int) -> None:
        num_blocks = self._pool.layout.num_blocks_for(num_seen)
        cells[0] = num_seen
        cells[1 : 1 + num_blocks] = blocks[:num_blocks]

    @torch.inference_mode()
    def _forward(self) -> None:
        """What is recorded. No value of a step may become Python's here: it would be the same in all replays."""
        decoder, device = self._decoder, self._inputs.device
        split = 2 + self._num_blocks
        table = self._inputs[:, 1:split]
        kept = self._reads(table, self._size.context)
        deep = kept if not self._size.deep_context else self._reads(self._inputs[:, split:], self._size.deep_context)
        batch = StepBatch(
            token_ids=self._inputs[:, 0].contiguous(),
            positions=table[:, 0] - 1,
            kept=kept,
            deep=deep if decoder.plan.num_skipped else None,
            shallow_rows=torch.empty(0, dtype=torch.int64, device=device),
            full_rows=None,
            logit_rows=torch.arange(self._size.rows, device=device),
        )
        logits = decoder.forward(batch, self._pool).logits
        if logits is None:
            raise InternalError("a graph of a stage without an lm_head")
        self._logits.copy_(logits)

    def _reads(self, table: torch.Tensor, context: int) -> AttentionPlan:
        """As ``ReadPlanner`` has it, of ``table`` ``[rows, 1 + blocks]``: tokens seen, and the blocks they are in."""
        num_seen, blocks = table[:, :1], table[:, 1:]
        written = self._slots(blocks, num_seen - 1).squeeze(1)
        windows = {window for window in self._decoder.spec.windows if window < context}
        windowed = {window: self._view(blocks, num_seen, written, window, {}) for window in windows}
        return self._view(blocks, num_seen, written, context, windowed)

    def _view(
        self,
        blocks: torch.Tensor,
        num_seen: torch.Tensor,
        written: torch.Tensor,
        width: int,
        windowed: dict[int, AttentionPlan],
    ) -> AttentionPlan:
        """Each row sees the last ``width`` tokens at most. What is padded is its own last one, nobody else's."""
        num_rows, column = len(written), torch.arange(width, device=written.device)
        index = torch.minimum((num_seen - width).clamp_(min=0) + column, num_seen - 1)
        lengths = num_seen.clamp(max=width)
        group = DecodeGroup(
            rows=torch.arange(num_rows, device=written.device),
            context=self._slots(blocks, index).view(-1),
            longest=width,
            lengths=lengths.squeeze(1),
            mask=(column < lengths)[:, None, None, :],
        )
        return AttentionPlan(num_rows, written, (), (group,), windowed)

    def _slots(self, blocks: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The slots of tokens ``index`` ``[rows, any]``, by rows' ``blocks``."""
        size = self._pool.layout.block_tokens
        return blocks.gather(1, index // size) * size + index % size
