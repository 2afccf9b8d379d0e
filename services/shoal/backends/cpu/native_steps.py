"""Steps that only decode, by one call of Shoal's own kernels: what they read, all layers, and the logits.

Nearly all steps are such ones, and a step of a small model takes a few milliseconds, of which tensors for a plan of any
kind (engine/runner.py) would be a tenth.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from shoal.backends.cpu import layers as native
from shoal.backends.cpu.kernels import MAX_FEW_ROWS, NativeKernels
from shoal.backends.cpu.native_layers import LayerTable
from shoal.model.decoder import Decoder
from shoal.model.kv_pool import KvPool
from shoal.model.packed import PANEL
from shoal.model.rope import all_angles
from shoal.model.shortlist import Shortlist

if TYPE_CHECKING:
    from shoal.engine.scheduler import ScheduledRows

MAX_SHORTLIST_ROWS = 3
"""These wait for memory alone (backends/cpu/src/whole_linear.cpp). Of more rows, the largest may be in more places."""
MOST_SETTLED = 0.25
"""Of a head: where the largest logit may be in more of it, a shortlist saves little or nothing."""
STEPS_WITHOUT_IT = 100
"""So many of the steps that it's for go without it then: the next tokens will hardly be surer."""


class NativeSteps:
    """Carries out ``DecodePath`` (engine/runner.py) for a decode stage, with the same numbers as any other step. Where
    only the largest logits are wanted, with a ``shortlist`` they alone are the same."""

    def __init__(self, decoder: Decoder, pool: KvPool, kernels: NativeKernels) -> None:
        self.shortlist: Shortlist | None = None
        self.num_without_it = 0
        self._decoder = decoder
        self._pool = pool
        self._kernels = kernels
        self._table = LayerTable(decoder.spec, decoder.parameters)
        windows = [window or 0 for window in self._table.windows]
        self._windows = (ctypes.c_int64 * len(windows))(*windows)

    @property
    def can_run(self) -> bool:
        """Whether all weights lie as the kernels take them, and deep layers find K/V where the others do."""
        return self._table.is_taken and self._table.has_head and self._pool.layout.apart is None

    @torch.inference_mode()
    def run(self, rows: Sequence[ScheduledRows]) -> torch.Tensor | None:
        decoder, table = self._decoder, self._table
        if not 0 < len(rows) <= MAX_FEW_ROWS or not all(item.goes_on for item in rows):
            return None
        last = max(item.start for item in rows)
        angles = [all_angles(each, last, decoder.dtype) for each in decoder.spec.rope_tables]
        ropes = [native.Rope(cos.data_ptr(), sin.data_ptr()) for cos, sin in filter(None, angles)]
        if len(ropes) < len(angles):
            return None
        sequences = array("q")
        for item in rows:
            blocks = item.sequence.blocks
            sequences.extend((item.end, len(blocks)))
            sequences.extend(blocks)
        hidden = decoder.embed(torch.tensor([item.sequence.last_token_id for item in rows]))
        logits = hidden.new_empty(len(rows), decoder.spec.vocab_size)
        shortlist = self._shortlist_for(rows)
        decoding = native.Decoding(
            len(rows),
            hidden.data_ptr(),
            sequences.buffer_info()[0],
            self._pool.layout.block_tokens,
            (native.Rope * len(ropes))(*ropes),
            len(ropes),
            self._windows,
            len(self._windows),
            ctypes.pointer(table.head(logits, shortlist)),
        )
        layers = table.of(self._pool)
        decoder.progressed()
        self._kernels.decode(table.shape, layers[0], len(layers), decoding)
        if shortlist is not None:
            _, normed = self._kernels.add_norm(hidden, None, decoder.parameters.final_norm, decoder.spec.norm_eps)
            num_made = self._kernels.settle(normed, shortlist.head.values, shortlist.bounds, logits)
            if num_made * PANEL > MOST_SETTLED * logits.shape[1]:
                self.num_without_it = STEPS_WITHOUT_IT
        return decoder.capped(logits)

    def _shortlist_for(self, rows: Sequence[ScheduledRows]) -> Shortlist | None:
        """For few greedy answers alone: of these nobody asks for more than the largest logit."""
        if len(rows) > MAX_SHORTLIST_ROWS or not all(item.sequence.wants_likeliest for item in rows):
            return None
        if self.num_without_it:
            self.num_without_it -= 1
            return None
        return self.shortlist
