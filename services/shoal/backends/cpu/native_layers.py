"""Whole layers by Shoal's own kernels, in one call instead of ten operations each."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from shoal.backends.cpu import layers as native
from shoal.backends.cpu.kernels import MAX_FEW_ROWS, NativeKernels
from shoal.backends.cpu.layers import pointer
from shoal.errors import InternalError
from shoal.model.batch import AttentionPlan, DecodeGroup, PromptSegment
from shoal.model.families import Activation, ModelSpec
from shoal.model.int8 import Int8Matrix
from shoal.model.kv_pool import KvPool
from shoal.model.matrix import Weight
from shoal.model.packed import PackedMatrix
from shoal.model.parameters import LayerParameters, Parameters
from shoal.model.rope import Rope
from shoal.model.shortlist import Shortlist


class LayerTable:
    """A stage's layers and lm_head as the kernels have them.

    ``is_taken`` says whether they take all layers as they lie, ``has_head`` whether the lm_head, too.
    """

    def __init__(self, spec: ModelSpec, parameters: Parameters) -> None:
        self._spec = spec
        self._parameters = parameters
        # Layers of one window read alike.
        self.windows = sorted({look.window for look in spec.layers}, key=lambda window: window or 0)
        self.shape = native.Shape(
            spec.hidden_size,
            spec.intermediate_size,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            spec.norm_eps,
            spec.attention_scale,
            int(spec.activation is not Activation.SILU),
        )
        parts = [part for layer in parameters.layers for part in _parts(layer)]
        self.is_taken = bool(parts) and all(map(_is_taken, parts))
        ends = (parameters.final_norm, parameters.lm_head)
        self.has_head = all(part is not None and _is_taken(part) for part in ends)
        self._pool: KvPool | None = None
        self._layers: ctypes.Array[native.Layer] | None = None

    def of(self, pool: KvPool) -> ctypes.Array[native.Layer]:
        """All layers, with K/V in ``pool``."""
        if self._layers is None or self._pool is not pool:
            self._pool = pool
            layers = [self._layer(*each, pool) for each in enumerate(self._parameters.layers)]
            self._layers = (native.Layer * len(layers))(*layers)
        return self._layers

    def head(self, logits: torch.Tensor, shortlist: Shortlist | None = None) -> native.Head:
        """What makes ``logits`` ``[rows, vocab]``, by the lm_head or as the shortlist has it."""
        norm, head = self._parameters.final_norm, self._parameters.lm_head
        if norm is None or head is None:
            raise InternalError("logits where there is no lm_head")
        if shortlist is None:
            matrix = _matrix(head, None)
        else:
            matrix = native.Matrix(shortlist.values.data_ptr(), shortlist.scales.data_ptr(), None, 1)
        return native.Head(pointer(norm), matrix, logits.shape[1], logits.data_ptr())

    def _layer(self, index: int, layer: LayerParameters, pool: KvPool) -> native.Layer:
        looks = self._spec.layers[index]
        return native.Layer(
            pointer(layer.input_norm),
            _matrix(layer.qkv, layer.qkv_bias),
            pointer(layer.q_norm),
            pointer(layer.k_norm),
            _matrix(layer.out, layer.out_bias),
            pointer(layer.attention_post_norm),
            pointer(layer.mlp_norm),
            _matrix(layer.gate_up, layer.gate_up_bias),
            _matrix(layer.down, layer.down_bias),
            pointer(layer.mlp_post_norm),
            pointer(pool.layers[index]),
            looks.rope,
            self.windows.index(looks.window),
        )


class NativeLayers:
    """Carries out ``RunLayers`` (model/decoder.py) where all that it needs is packed."""

    def __init__(self, table: LayerTable, kernels: NativeKernels) -> None:
        self._table = table
        self._kernels = kernels

    def __call__(
        self,
        layers: range,
        hidden: torch.Tensor,
        rope: Rope,
        pool: KvPool,
        reads: AttentionPlan,
        progressed: Callable[[], None],
    ) -> torch.Tensor | None:
        table = self._table
        if not (table.is_taken and layers and reads.num_rows):
            return None
        held, out = table.of(pool), hidden.clone(memory_format=torch.contiguous_format)
        if layers.stop > len(held):
            raise InternalError(f"{layers.stop} layers of {len(held)}")
        ropes = [native.Rope(cos.data_ptr(), sin.data_ptr()) for cos, sin in zip(rope.cos, rope.sin, strict=True)]
        views = [_reads(reads.within(window)) for window in table.windows]
        step = native.Step(
            reads.num_rows,
            out.data_ptr(),
            reads.slots.data_ptr(),
            (native.Rope * len(ropes))(*ropes),
            (native.Reads * len(views))(*views),
        )
        # What may take long, somebody wants to hear of layer by layer: a few rows, too, where they look at many others.
        is_long = reads.num_rows > MAX_FEW_ROWS or bool(reads.prompts)
        at_once = 1 if is_long else len(layers)
        for layer in layers[::at_once]:
            progressed()
            self._kernels.run_layers(table.shape, held[layer], at_once, step)
        return out


def _matrix(weight: Weight, bias: torch.Tensor | None) -> native.Matrix:
    if isinstance(weight, Int8Matrix):
        return native.Matrix(weight.values.data_ptr(), weight.scales.data_ptr(), pointer(bias))
    if isinstance(weight, PackedMatrix):
        return native.Matrix(weight.values.data_ptr(), None, pointer(bias))
    raise InternalError("whole layers want matrices that are packed")


def _reads(plan: AttentionPlan) -> native.Reads:
    return native.Reads.of([_group(one) for one in plan.groups], [_prompt(one) for one in plan.prompts])


def _group(group: DecodeGroup) -> native.Group:
    slots, first = native.slots(group.context)
    return native.Group(
        group.rows.data_ptr(), slots, first, group.longest, group.lengths.data_ptr(), group.rows.shape[0]
    )


def _prompt(segment: PromptSegment) -> native.Prompt:
    slots, first = native.slots(segment.context)
    num_rows = segment.row_end - segment.row_start
    return native.Prompt(segment.row_start, num_rows, slots, first, segment.num_context, segment.window or 0)


def _parts(layer: LayerParameters) -> list[Weight]:
    parts = (getattr(layer, field) for field in LayerParameters.__slots__)
    return [part for part in parts if part is not None]


def _is_taken(part: Weight) -> bool:
    """Whether the kernels take it as it lies."""
    if isinstance(part, Int8Matrix):
        return part.values.is_contiguous() and part.scales.is_contiguous()
    if isinstance(part, PackedMatrix):
        return part.dtype == torch.bfloat16
    return part.dim() == 1 and part.dtype == torch.bfloat16 and part.is_contiguous()
