"""From a plain-Python step plan to tensors, through the decoder, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from shoal.engine.logprobs import ScoredToken, score
from shoal.engine.scheduler import ScheduledRows, StepPlan
from shoal.engine.sequence import Sequence
from shoal.errors import InternalError
from shoal.model.batch import StepBatch
from shoal.model.decoder import Decoder
from shoal.model.kv_pool import KvPool, on_host
from shoal.model.kv_rows import KvRows
from shoal.model.reads import ReadPlanner, Span
from shoal.wire.handoff_messages import WireMode

# Rows of prompts whose logits exist at once: 256 of a vocabulary of 128k are 128 MiB in float32.
MAX_LOGIT_ROWS = 256

KV_NOT_FINITE = "K/V of the prompt are NaN or infinite: check the weights, and the dtype they are run in"

# About what is projected at a time: the next layers are computed while these are on their way.
PROJECTED_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """K/V of tokens ``[start, end)`` of one prompt in some ``layers``, ready to ship; no tokens if decode has them all.

    ``payload`` is ``[layers, tokens, 2, kv_heads, head_dim]``, or in HIDDEN mode the states ``[tokens, hidden]`` that
    decode is to project those layers from: a contiguous copy on the host, or K/V where they lie. The kept layers come
    first; what is projected follows, some layers at a time, so that it's computed while others are on their way.
    ``is_whole``: nothing follows. ``num_present`` tokens at the prompt's front were found so far, and not computed.
    """

    request_id: str
    start: int
    end: int
    layers: range
    payload: torch.Tensor | KvRows
    wire_mode: WireMode = WireMode.KV
    is_whole: bool = True
    num_present: int = 0


@dataclass(frozen=True, slots=True)
class RunOutput:
    """What a step brought, all in the order of its rows.

    ``logits`` is ``[sequences that sample, vocab]`` (``None`` if none does), of a step by ``DecodePath`` as it says;
    ``chunks`` are to be shipped, and what ``unprojected`` rows are projected to, but nothing of ``broken`` rows, whose
    K/V are no numbers (some of their prompts may have left in steps before); ``scores`` has one item for each sequence
    with prompt tokens to score.
    """

    logits: torch.Tensor | None
    chunks: tuple[PrefillChunk, ...] = ()
    unprojected: tuple[ScheduledRows, ...] = ()
    scores: tuple[tuple[ScoredToken, ...], ...] = ()
    broken: tuple[ScheduledRows, ...] = ()


class DecodePath(Protocol):
    """A quicker way for steps of sequences that only go on (native_steps.py, step_graph.py)."""

    def run(self, rows: tuple[ScheduledRows, ...]) -> torch.Tensor | None:
        """Logits ``[len(rows), vocab]``, which hold until the next call; K/V are in the pool then. If all of the
        sequences want the likeliest token (``Sequence.wants_likeliest``), the largest alone need be exact. ``None``:
        it's no step for it, and nothing was done."""


class Runner:
    """Builds the tensors of a step and runs it; a ``decode_path``, if there is one, runs what it can."""

    def __init__(self, decoder: Decoder, pool: KvPool, decode_path: DecodePath | None = None) -> None:
        self.decoder = decoder
        self.pool = pool
        self.decode_path = decode_path
        self._device = decoder.parameters.embedding.device
        self.reads = ReadPlanner(pool.layout, self._device, decoder.spec.windows)
        self._is_apart = pool.layout.apart is not None
        self.progressed: Callable[[], None] = lambda: None

    def run(self, plan: StepPlan) -> RunOutput:
        """Run one step; K/V of its rows are in the pool afterwards. Its logits hold until the next."""
        self.pool.copy_blocks(plan.copies)
        self.pool.copy_blocks(plan.deep_copies, deep=True)
        rows = plan.rows
        computed = [item for item in (*plan.recalls, *rows) if not item.sequence.sampled]
        if not rows:
            return self._output(None, computed)
        if self.decode_path is not None and (logits := self.decode_path.run(rows)) is not None:
            return self._output(logits, computed)
        tensors = self.decoder.forward(self.batch(rows), self.pool)
        scores = () if tensors.scored is None else self._scores(rows, tensors.scored)
        return self._output(tensors.logits, computed, scores)

    def wait(self) -> None:
        """For what the device still computes, as a GPU does when Python has gone on: the next step would be taken for
        as slow as both."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    @torch.inference_mode()
    def project(self, item: ScheduledRows) -> Iterator[PrefillChunk]:
        """K/V of ``unprojected`` rows in the skipped layers, some layers at a time; the first is to be asked for while
        their blocks hold the states that they left."""
        self.progressed()
        states = self.pool.read_states(self._slots(item))
        positions = torch.arange(item.start, item.end, device=self._device)
        for layers in self._at_a_time(len(positions)):
            projected = self.decoder.project(states, positions, layers).to(self.pool.dtype)
            is_whole = layers.stop == self.decoder.plan.skipped.stop
            payload = on_host(projected.contiguous())
            yield PrefillChunk(
                item.sequence.request_id, item.start, item.end, layers, payload,
                is_whole=is_whole, num_present=item.sequence.num_present,
            )  # fmt: skip

    def _at_a_time(self, num_tokens: int) -> list[range]:
        skipped, projection = self.decoder.plan.skipped, self.decoder.parameters.projection
        if projection is None or not projection.can_be_cut:
            return [skipped]
        return portions(skipped, num_tokens * self.pool.layout.token_layer_bytes)

    def batch(self, rows: tuple[ScheduledRows, ...]) -> StepBatch:
        """The tensors of a step; logits are wanted of the last row of each sequence that it completes."""
        token_ids: list[int] = []
        positions: list[int] = []
        shallow: list[int] = []
        full: list[int] = []
        wanted: list[int] = []
        scored: list[int] = []
        deep: list[Span] = []
        for item in rows:
            offset = len(positions)
            sequence = item.sequence
            token_ids += sequence.token_ids(item.start, item.end)
            positions += range(item.start, item.end)
            # Anchors, shallow tokens, then full depth again: any of the three may be empty.
            edges = (sequence.shallow.start, sequence.shallow.stop)
            bounds = (item.start, *(min(max(edge, item.start), item.end) for edge in edges), item.end)
            for start, end in (bounds[:2], bounds[2:]):
                full += range(offset + start - item.start, offset + end - item.start)
                if start < end:
                    deep.append(self._deep_span(sequence, start, end))
            shallow += range(offset + bounds[1] - item.start, offset + bounds[2] - item.start)
            if item.samples:
                wanted.append(len(full) - 1)
            scored += (len(full) - item.end + position for position in item.scored)
        kept = self.reads.plan([Span(item.sequence.blocks, item.start, item.end) for item in rows])
        mixed = bool(shallow)
        # Layers that nobody skips (or a stage that has none) need no second reading plan.
        has_deep = bool(deep) and bool(self.decoder.plan.num_skipped)
        return StepBatch(
            token_ids=self._index(token_ids),
            positions=self._index(positions),
            kept=kept,
            deep=(self.reads.plan(deep) if mixed or self._is_apart else kept) if has_deep else None,
            shallow_rows=self._selected(shallow) if full else None,
            full_rows=self._selected(full) if mixed else None,
            logit_rows=self._index(wanted),
            scored_rows=self._index(scored) if scored else None,
        )

    def _deep_span(self, sequence: Sequence, start: int, end: int) -> Span:
        """Where deep layers hold full-depth tokens alone, these follow one another, whatever lies between them."""
        if self._is_apart:
            return Span(sequence.deep_blocks, sequence.num_full_before(start), sequence.num_full_before(end))
        return Span(sequence.blocks, start, end)

    @torch.inference_mode()
    def _scores(self, rows: tuple[ScheduledRows, ...], states: torch.Tensor) -> tuple[tuple[ScoredToken, ...], ...]:
        """Log-probabilities of prompt tokens, each by the row before it; never many logits at once."""
        items = [item for item in rows if item.scored]
        token_ids = [item.sequence.prompt[position + 1] for item in items for position in item.scored]
        num_top = [item.sequence.sampling.num_prompt_logprobs or 0 for item in items for _ in item.scored]
        tokens: list[ScoredToken] = []
        for start in range(0, len(token_ids), MAX_LOGIT_ROWS):
            piece = slice(start, start + MAX_LOGIT_ROWS)
            logits = self.decoder.logits(states, torch.arange(len(token_ids), device=self._device)[piece])
            if logits is None:
                raise InternalError("prompt log-probabilities where there is no lm_head: decode computes them")
            tokens += score(logits, token_ids[piece], num_top[piece])
        each = iter(tokens)
        return tuple(tuple(islice(each, len(item.scored))) for item in items)

    def _selected(self, rows: list[int]) -> torch.Tensor | slice:
        """Rising ``rows``: where they follow one another, what they select is no copy."""
        if rows and rows[-1] - rows[0] + 1 == len(rows):
            return slice(rows[0], rows[-1] + 1)
        return self._index(rows)

    def _index(self, values: list[int] | npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int64, device=self._device)

    @torch.inference_mode()
    def _output(
        self,
        logits: torch.Tensor | None,
        computed: Iterable[ScheduledRows],
        scores: tuple[tuple[ScoredToken, ...], ...] = (),
    ) -> RunOutput:
        """With what prefill ships of ``computed`` rows: kept layers, as the pool has them, and states where decode
        projects. What is to be projected here can wait until those are on their way."""
        chunks: list[PrefillChunk] = []
        unprojected: list[ScheduledRows] = []
        broken: list[ScheduledRows] = []
        plan = self.decoder.plan
        for whole in computed:
            self.progressed()
            if not self._is_finite(whole):
                broken.append(whole)
                continue
            item = _unshipped(whole)
            request_id, start, end = item.sequence.request_id, item.start, item.end
            num_present = item.sequence.num_present
            kept = self._kept(self._slots(item))
            has_more = bool(self.pool.layout.state_dim) and start < end
            chunks.append(
                PrefillChunk(request_id, start, end, plan.kept, kept, is_whole=not has_more, num_present=num_present)
            )
            if has_more and item.sequence.wire_mode is WireMode.HIDDEN:
                states = on_host(self.pool.read_states(self._slots(item)))
                chunks.append(
                    PrefillChunk(request_id, start, end, plan.skipped, states, WireMode.HIDDEN, num_present=num_present)
                )
            elif has_more:
                unprojected.append(item)
        return RunOutput(logits, tuple(chunks), tuple(unprojected), scores, tuple(broken))

    def _is_finite(self, item: ScheduledRows) -> bool:
        """Whether what decode would get are numbers. What is none in any layer of a row, or of one that it sees, makes
        its state none: so blocks that others have left here are looked at, too, as soon as a row comes after them."""
        held = [self.pool.read(self.decoder.plan.num_kept - 1, self._slots(item))]
        if self.pool.layout.state_dim:  # of an anchor there is none
            shallow = item.sequence.shallow
            start, end = max(item.start, shallow.start), min(item.end, shallow.stop)
            held.append(self.pool.read_states(self._slots(ScheduledRows(item.sequence, start, max(start, end)))))
        # The least and the largest are NaN where a number is: to ask each takes ten times as long.
        return all(bool(edge.isfinite()) for one in held if one.numel() for edge in torch.aminmax(one))

    def _kept(self, slots: torch.Tensor) -> torch.Tensor | KvRows:
        num_kept = self.decoder.plan.num_kept
        rows = self.pool.rows(0, num_kept, slots)
        return on_host(self.pool.read_layers(0, num_kept, slots)) if rows is None else rows

    def _slots(self, item: ScheduledRows) -> torch.Tensor:
        return self._index(self.pool.layout.slots(item.sequence.blocks, item.start, item.end))


def _unshipped(item: ScheduledRows) -> ScheduledRows:
    """Of its rows those that decode hasn't got."""
    return ScheduledRows(item.sequence, min(max(item.start, item.sequence.num_shipped), item.end), item.end)


def portions(layers: range, layer_bytes: int) -> list[range]:
    """``layers`` as they are projected: about as many each time, and at least one."""
    num_portions = min(len(layers), -(-len(layers) * layer_bytes // PROJECTED_BYTES))
    edges = [layers.start + len(layers) * portion // num_portions for portion in range(num_portions + 1)]
    return [range(*edge) for edge in pairwise(edges)]
