"""A model under examination: its weights once, and steps of given text through any part of it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from weakref import WeakKeyDictionary

import torch

from shoal.backends.chooser import Chooser
from shoal.backends.cpu.kernels import NativeKernels
from shoal.backends.cpu.native import find_kernels, hold_for, make_chooser, make_decoder
from shoal.engine.runner import Runner
from shoal.engine.scheduler import ScheduledRows
from shoal.engine.sequence import Sequence as Rows
from shoal.errors import ConfigError, InvalidRequest
from shoal.model.batch import StepBatch
from shoal.model.decoder import Decoder
from shoal.model.families import ModelSpec
from shoal.model.files import ModelFiles
from shoal.model.int8 import Int8Matrix
from shoal.model.kv_layout import stage_layout
from shoal.model.kv_pool import KvPool
from shoal.model.matrix import Hold
from shoal.model.parameters import ParameterLoader, Parameters
from shoal.model.plan import LayerPlan
from shoal.model.projection import KvProjection, LayerProjection
from shoal.model.reads import Span
from shoal.model.weights import open_weights
from shoal.wire.messages import SamplingParams, Stage

_BLOCK_TOKENS = 16


class Treatment(enum.StrEnum):
    """How a prompt is encoded. The last three are negative controls: each takes away one part of the method."""

    FULL = "full"
    SHALLOW = "shallow"
    SPEED = "speed"
    NO_PROJECTION = "no_projection"
    NO_BOUNDARY = "no_boundary"
    REMOVED = "removed"


class Subject:
    """All layers of a model in memory, once, and views of them for every number of skipped layers.

    ``max_tokens`` is the longest text, prompt and continuation together, that it is asked about.
    """

    def __init__(self, files: ModelFiles, spec: ModelSpec, parameters: Parameters, *, max_tokens: int) -> None:
        self.files = files
        self.spec = spec
        self.parameters = parameters
        self.max_tokens = max_tokens
        embedding = parameters.embedding
        self.layout = stage_layout(
            num_layers=spec.num_layers, num_kept=spec.num_layers, num_held=spec.num_layers,
            num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, dtype_bytes=embedding.dtype.itemsize,
            block_tokens=_BLOCK_TOKENS,
        )  # fmt: skip
        self._kernels: NativeKernels | None = None
        with suppress(ConfigError):  # torch computes the same
            self._kernels = find_kernels(spec, embedding.dtype, embedding.dtype, embedding.device)
        num_blocks = self.layout.num_blocks_for(max_tokens)
        self.new_pool = partial(KvPool, self.layout, num_blocks, dtype=embedding.dtype, device=embedding.device)
        self.pool = self.new_pool()
        self._blocks = list(range(num_blocks))
        self.projection = lru_cache(maxsize=None)(self._paper_projection)
        self._packed_projections: WeakKeyDictionary[KvProjection, KvProjection] = WeakKeyDictionary()

    @cached_property
    def in_int8(self) -> Subject:
        """The same model as decode may hold it, with a pool of its own; made when it's first asked for."""
        return Subject(self.files, self.spec, self.parameters.held(Int8Matrix.of), max_tokens=self.max_tokens)

    @property
    def kernels(self) -> str:
        """Whose compute where no gradient is wanted: ``native`` or ``torch``."""
        return "torch" if self._kernels is None else "native"

    @classmethod
    def load(
        cls,
        files: ModelFiles,
        *,
        dtype: torch.dtype,
        max_tokens: int,
        device: torch.device | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Subject:
        """``on_progress`` is called with (layers done, layers in all). Raises ModelError."""
        spec = files.spec()
        device = device or torch.device("cpu")
        with open_weights(files) as reader:
            loader = ParameterLoader(reader, spec, dtype=dtype, device=device, on_progress=on_progress)
            parameters = loader.load(LayerPlan(spec.num_layers, 0), Stage.DECODE)
        return cls(files, spec, parameters, max_tokens=max_tokens)

    def projections(self, num_skipped: int) -> list[LayerProjection]:
        """The norms and K/V matrices of the last ``num_skipped`` layers, views of the loaded ones."""
        skipped = LayerPlan(self.spec.num_layers, num_skipped).skipped
        return [self.parameters.layers[index].projection(self.spec, index) for index in skipped]

    def decoder(self, plan: LayerPlan, parameters: Parameters) -> Decoder:
        """As an engine would have it; where gradients are wanted, one that can be differentiated."""
        if torch.is_grad_enabled() or self._kernels is None:
            return make_decoder(self.spec, plan, Stage.DECODE, parameters, None)
        projection = None if parameters.projection is None else self._packed_projection(parameters.projection)
        packed = replace(self._packed, projection=projection)
        return make_decoder(self.spec, plan, Stage.DECODE, packed, self._kernels)

    def chooser(self) -> Chooser:
        """Of tokens, as an engine would have it."""
        return make_chooser(self._kernels)

    @cached_property
    def _packed(self) -> Parameters:
        """As the kernels want them: beside the loaded ones, of which projections are made and gradients go through."""
        return self.parameters if self._hold is None else self.parameters.held(self._hold)

    def _packed_projection(self, projection: KvProjection) -> KvProjection:
        """Once, for as long as the one it's made of is there."""
        if self._hold is None:
            return projection
        if projection not in self._packed_projections:
            self._packed_projections[projection] = projection.held(self._hold)
        return self._packed_projections[projection]

    @property
    def _hold(self) -> Hold | None:
        return hold_for(self._kernels)

    def step(
        self,
        plan: LayerPlan,
        parameters: Parameters,
        ids: Sequence[int],
        num_prompt_tokens: int,
        shallow: range,
        *,
        hides_shallow: bool = False,
    ) -> tuple[Decoder, StepBatch]:
        """A decoder, and one step of all of ``ids``, whose logits are wanted after each of the tokens ``N-1..``.

        Where it ``hides_shallow``, the skipped layers read no K/V of shallow tokens. Raises InvalidRequest if the text
        is longer than ``max_tokens``, or has no prompt.
        """
        if not 1 <= num_prompt_tokens <= len(ids) <= self.max_tokens:
            raise InvalidRequest(f"{num_prompt_tokens} prompt tokens of {len(ids)}, and at most {self.max_tokens}")
        decoder = self.decoder(plan, parameters)
        runner = Runner(decoder, self.pool)
        batch = runner.batch((self._rows(ids, shallow, 0, len(ids)),))
        wanted = torch.arange(num_prompt_tokens - 1 - len(shallow), len(ids) - len(shallow))
        batch = replace(batch, logit_rows=wanted.to(batch.token_ids.device))
        if hides_shallow and batch.deep is not None:
            # As if the others followed one another: their positions stay, the deep layers' K/V between them don't.
            own = Span(self._blocks, 0, len(ids) - len(shallow))
            batch = replace(batch, deep=runner.reads.plan((own,)))
        return decoder, batch

    @torch.inference_mode()
    def go_on(self, ids: Sequence[int], num_prompt_tokens: int, start: int) -> torch.Tensor | None:
        """``[len(ids) - N + 1, vocab]`` after each of the tokens ``N-1..``, all from ``start`` on at full depth, in one
        step. K/V of those before ``start`` are in the pool."""
        runner = Runner(self.decoder(LayerPlan(self.spec.num_layers, 0), self.parameters), self.pool)
        batch = runner.batch((self._rows(ids, range(0), start, len(ids)),))
        wanted = torch.arange(num_prompt_tokens - 1 - start, len(ids) - start)
        batch = replace(batch, logit_rows=wanted.to(batch.token_ids.device))
        return runner.decoder.forward(batch, self.pool).logits

    def _rows(self, ids: Sequence[int], shallow: range, start: int, end: int) -> ScheduledRows:
        rows = Rows("text", tuple(ids), shallow, SamplingParams(max_tokens=1), blocks=self._blocks)
        return ScheduledRows(rows, start, end)

    def _paper_projection(self, num_skipped: int) -> KvProjection:
        return KvProjection(self.spec, self.projections(num_skipped))
