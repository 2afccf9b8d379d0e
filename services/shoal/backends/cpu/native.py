"""The decoder's operations by Shoal's own kernels: bfloat16 on a CPU that has its instructions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shoal.backends.attention import attend
from shoal.backends.chooser import Chooser, SampleRow, TorchChooser, uniform
from shoal.backends.cpu.kernels import HEAD_DIMS, NativeKernels, load
from shoal.backends.cpu.native_layers import LayerTable, NativeLayers
from shoal.backends.cpu.native_steps import NativeSteps
from shoal.errors import ConfigError
from shoal.model.batch import AttentionPlan
from shoal.model.decoder import Decoder
from shoal.model.families import Activation, ModelSpec
from shoal.model.huge_pages import use_huge_pages
from shoal.model.int8 import Int8Matrix
from shoal.model.kv_pool import KvPool
from shoal.model.matrix import Hold, Weight
from shoal.model.packed import PackedMatrix, packed
from shoal.model.parameters import Parameters
from shoal.model.plan import LayerPlan
from shoal.model.projection import KvProjection
from shoal.model.rope import Rope
from shoal.model.rows import TorchRows
from shoal.model.shortlist import Shortlist
from shoal.wire.messages import Stage


def check_native(spec: ModelSpec, dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device) -> None:
    """Raises ConfigError that says what the kernels can't do of this."""
    if device.type != "cpu":
        raise ConfigError("they are for CPUs")
    if {dtype, kv_dtype} != {torch.bfloat16}:
        raise ConfigError("they compute in bfloat16 only")
    if spec.head_dim not in HEAD_DIMS:
        raise ConfigError(f"heads of {spec.head_dim} numbers aren't among {sorted(HEAD_DIMS)}")
    if spec.attention_softcap is not None:
        raise ConfigError("they know no softcap")
    if any(size % 32 for size in (spec.hidden_size, spec.intermediate_size)):
        raise ConfigError("they take sizes that are multiples of 32")


def find_kernels(spec: ModelSpec, dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device) -> NativeKernels:
    """Raises ConfigError that says why torch must compute."""
    check_native(spec, dtype, kv_dtype, device)
    return load()


def hold_for(kernels: NativeKernels | None) -> Hold | None:
    """How matrices are to lie for whoever multiplies them; ``None``: as they are."""
    return None if kernels is None else packed


def make_decoder(
    spec: ModelSpec, plan: LayerPlan, stage: Stage, parameters: Parameters, kernels: NativeKernels | None
) -> Decoder:
    """``None``: torch computes."""
    if kernels is None:
        return Decoder(spec, plan, stage, parameters, attend)
    layers = NativeLayers(LayerTable(spec, parameters), kernels)
    return Decoder(spec, plan, stage, parameters, NativeAttention(kernels), NativeRows(spec, kernels), layers)


def make_decode_path(decoder: Decoder, pool: KvPool, kernels: NativeKernels | None) -> NativeSteps | None:
    """A quicker way for steps of a decode stage that only decode, where the kernels take all of them."""
    if kernels is None:
        return None
    steps = NativeSteps(decoder, pool, kernels)
    if not steps.can_run:
        return None
    steps.shortlist = _shortlist_of(decoder)
    return steps


def num_bytes_beside(path: object) -> int:
    """What a decode path keeps of the weights in another form."""
    shortlist = path.shortlist if isinstance(path, NativeSteps) else None
    return 0 if shortlist is None else shortlist.num_bytes


def _shortlist_of(decoder: Decoder) -> Shortlist | None:
    """None in int8, of which it would be another copy, nor where logits are capped, which makes equals of others."""
    head = decoder.parameters.lm_head
    if decoder.spec.logit_softcap is not None or not isinstance(head, PackedMatrix):
        return None
    shortlist = Shortlist.of(head)
    if shortlist is not None:
        use_huge_pages([shortlist.values])
    return shortlist


def make_chooser(kernels: NativeKernels | None) -> Chooser:
    """``None``: torch chooses."""
    return TorchChooser() if kernels is None else NativeChooser(kernels)


class NativeAttention:
    """Carries out ``Attend``."""

    def __init__(self, kernels: NativeKernels) -> None:
        self._kernels = kernels

    def __call__(
        self,
        queries: torch.Tensor,
        pool: KvPool,
        layer: int,
        reads: AttentionPlan,
        *,
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        held = pool.layers[layer]
        mixed = queries.new_empty(queries.shape)
        for segment in reads.prompts:
            rows = slice(segment.row_start, segment.row_end)
            self._kernels.attend_prompt(
                queries[rows], held, segment.context, segment.num_context, segment.window, scale, mixed[rows]
            )
        for group in reads.groups:
            self._kernels.attend_decode(
                queries, group.rows, held, group.context, group.longest, group.lengths, scale, mixed
            )
        return mixed


class NativeRows(TorchRows):
    """Carries out ``RowOps``; what the kernels don't take (float32, a matrix that isn't packed), torch does."""

    def __init__(self, spec: ModelSpec, kernels: NativeKernels) -> None:
        super().__init__(spec)
        self._kernels = kernels
        self._is_gelu = spec.activation is not Activation.SILU

    def embed(self, table: Weight, index: torch.Tensor) -> torch.Tensor:
        if not isinstance(table, PackedMatrix):
            return super().embed(table, index)
        return self._kernels.packed_rows(table.values, table.num_outputs, index)

    def norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if weight.dtype != hidden.dtype:
            return super().norm(hidden, weight)
        rows = hidden.reshape(-1, hidden.shape[-1]).contiguous()  # heads lie apart
        return self._kernels.add_norm(rows, None, weight, self._spec.norm_eps)[1].view(hidden.shape)

    def add(self, hidden: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        if not (hidden.is_contiguous() and added.is_contiguous()):
            return super().add(hidden, added)
        return self._kernels.add(hidden, added)

    def add_norm(
        self, hidden: torch.Tensor, added: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if weight.dtype != hidden.dtype or not (hidden.is_contiguous() and added.is_contiguous()):
            return super().add_norm(hidden, added, weight)
        return self._kernels.add_norm(hidden, added, weight, self._spec.norm_eps)

    def rotate_and_store(
        self, heads: torch.Tensor, rope: Rope, table: int, pool: KvPool, layer: int, slots: torch.Tensor
    ) -> torch.Tensor:
        num_heads = self._spec.num_heads
        self._kernels.rotate_store(heads, num_heads, rope.cos[table], rope.sin[table], pool.layers[layer], slots)
        return heads[:, :num_heads]

    def gated(self, inputs: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
        if not isinstance(weight, torch.Tensor) and inputs.shape[0] and weight.num_outputs % 64 == 0:
            num_gated, is_gelu, inputs = weight.num_outputs // 2, self._is_gelu, inputs.contiguous()
            if isinstance(weight, PackedMatrix):
                return self._kernels.gated_linear(inputs, weight.values, num_gated, bias, is_gelu=is_gelu)
            return self._kernels.int8_gated_linear(
                inputs, weight.values, weight.scales, num_gated, bias, is_gelu=is_gelu
            )
        return self._kernels.gate(self.linear(inputs, weight, bias), is_gelu=self._is_gelu)

    def linear(self, inputs: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        if isinstance(weight, PackedMatrix) and inputs.shape[0]:
            return self._kernels.linear(inputs.contiguous(), weight.values, weight.num_outputs, bias)
        if isinstance(weight, Int8Matrix) and inputs.shape[0]:
            inputs = inputs.contiguous()
            return self._kernels.int8_linear(inputs, weight.values, weight.scales, weight.num_outputs, bias)
        return super().linear(inputs, weight, bias)

    def project(self, projection: KvProjection, hidden: torch.Tensor, rope: Rope) -> torch.Tensor:
        matrix = _panels(projection, hidden)
        if matrix is None:
            return projection(hidden, rope, self.linear)
        spec, rows = self._spec, hidden.shape[0]
        projected = hidden.new_empty(projection.num_layers, rows, 2, spec.num_kv_heads, spec.head_dim)
        self._project_to(list(projected), None, projection, matrix, hidden, rope)
        return projected

    def project_and_store(
        self, projection: KvProjection, hidden: torch.Tensor, rope: Rope, pool: KvPool, first: int, slots: torch.Tensor
    ) -> None:
        matrix = _panels(projection, hidden)
        if matrix is None:
            return super().project_and_store(projection, hidden, rope, pool, first, slots)
        targets = pool.layers[first : first + projection.num_layers]
        return self._project_to(targets, slots, projection, matrix, hidden, rope)

    def _project_to(
        self,
        targets: Sequence[torch.Tensor],
        slots: torch.Tensor | None,
        projection: KvProjection,
        matrix: PackedMatrix,
        hidden: torch.Tensor,
        rope: Rope,
    ) -> None:
        """A layer's K/V go to one of ``targets`` ``[any, 2, kv_heads, head_dim]``: to ``slots``, or one by one."""
        spec = self._spec
        normed = self._kernels.add_norm(hidden, None, None, spec.norm_eps)[1]
        angles = [(rope.cos[table], rope.sin[table]) for table in projection.ropes]
        self._kernels.project(normed, matrix.values, projection.bias, targets, angles, slots)
        sinks = projection.of_sinks(normed, rope)
        if sinks is None:
            return
        rows, flat = sinks
        heads = flat.view(len(rows), projection.num_layers, 2 * spec.num_kv_heads, spec.head_dim)
        slots = rows if slots is None else slots[rows]
        for layer, ((cos, sin), target) in enumerate(zip(angles, targets, strict=True)):
            self._kernels.rotate_store(heads[:, layer], 0, cos[rows], sin[rows], target, slots)


def _panels(projection: KvProjection, hidden: torch.Tensor) -> PackedMatrix | None:
    """What the kernels project by. They norm no keys, and take rows that lie one after the other."""
    matrix = projection.matrix
    can_be = projection.k_norm is None and hidden.is_contiguous() and hidden.shape[0] > 0
    return matrix if can_be and isinstance(matrix, PackedMatrix) else None


class NativeChooser(TorchChooser):
    """Carries out ``Chooser``; what isn't bfloat16, torch does."""

    def __init__(self, kernels: NativeKernels) -> None:
        self._kernels = kernels

    def likeliest(self, logits: torch.Tensor) -> tuple[torch.Tensor, bool]:
        if logits.dtype != torch.bfloat16:
            return super().likeliest(logits)
        return self._kernels.argmax(logits.contiguous())

    def drawn(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
        if logits.dtype != torch.bfloat16:
            return super().drawn(logits, rows)
        params = [row.params for row in rows]
        return self._kernels.draw(
            logits.contiguous(),
            [one.temperature for one in params],
            [one.top_k for one in params],
            [one.top_p for one in params],
            [uniform(row.params.seed, row.choice, row.index) for row in rows],
        )
