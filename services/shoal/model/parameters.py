"""The weights that one stage holds, fused for the decoder and loaded layer by layer.

A prefill replica takes the kept layers, the embedding, and of each skipped layer nothing but the K/V projection: no
deep MLP, no deep attention, no final norm, no lm_head. A decode replica takes everything. What a step multiplies may be
held in another form (model/matrix.py): then at no time is there more than one layer of it as it was read, but for the
K/V matrices of skipped layers, until they are folded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from shoal.errors import InternalError, MalformedWeights
from shoal.model.families import ModelSpec
from shoal.model.matrix import Hold, Weight
from shoal.model.packed import PackedMatrix
from shoal.model.plan import LayerPlan
from shoal.model.projection import KvProjection, LayerProjection
from shoal.wire.messages import Stage


class Reader(Protocol):
    """What is asked of a weight file (model/weights.py): tensors by their transformers name."""

    @property
    def names(self) -> frozenset[str]: ...

    def read(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class LayerParameters:
    """One whole layer. ``qkv`` is ``[q_size + 2 * kv_size, hidden]``, ``gate_up`` ``[2 * intermediate, hidden]``.

    ``input_norm`` and ``mlp_norm`` stand before attention and MLP; ``attention_post_norm`` and ``mlp_post_norm``, where
    a family has them, after. ``q_norm`` and ``k_norm`` are ``[head_dim]``. A family's norm offset is added already.
    """

    input_norm: torch.Tensor
    qkv: Weight
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    out: Weight
    out_bias: torch.Tensor | None
    attention_post_norm: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: Weight
    gate_up_bias: torch.Tensor | None
    down: Weight
    down_bias: torch.Tensor | None
    mlp_post_norm: torch.Tensor | None

    def projection(self, spec: ModelSpec, index: int) -> LayerProjection:
        """What a token that skips this layer, number ``index``, needs of it: views, nothing is copied."""
        if not isinstance(self.qkv, torch.Tensor):
            raise InternalError("a projection is folded of what was read, not of how a stage holds it")
        bias = None if self.qkv_bias is None else self.qkv_bias[spec.q_size :]
        rope = spec.layers[index].rope
        return LayerProjection(self.input_norm, self.qkv[spec.q_size :], bias, self.k_norm, rope)

    def held(self, hold: Hold, name: str) -> LayerParameters:
        """Its four matrices so, all else as it is. Raises MalformedWeights."""
        return replace(
            self,
            qkv=_held(self.qkv, hold, f"{name}.qkv"),
            out=_held(self.out, hold, f"{name}.out"),
            gate_up=_held(self.gate_up, hold, f"{name}.gate_up"),
            down=_held(self.down, hold, f"{name}.down"),
        )


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a stage holds. ``layers`` are the first ones; ``final_norm`` and ``lm_head`` are decode's only.

    ``lm_head`` is the embedding itself where the model ties them. ``projection`` is ``None`` if nothing is skipped.
    """

    embedding: Weight
    layers: tuple[LayerParameters, ...]
    projection: KvProjection | None
    final_norm: torch.Tensor | None
    lm_head: Weight | None

    def held(self, hold: Hold) -> Parameters:
        """What a step multiplies so, where it is still as it was read. An embedding that isn't the head, too, is only
        looked up, and stays as it is. Raises MalformedWeights."""
        is_tied = self.lm_head is self.embedding
        head = None if self.lm_head is None else _held(self.lm_head, hold, "lm_head")
        embedding = head if is_tied and head is not None else self.embedding
        layers = tuple(layer.held(hold, f"layers.{index}") for index, layer in enumerate(self.layers))
        projection = None if self.projection is None else self.projection.held(hold)
        return replace(self, embedding=embedding, lm_head=head, layers=layers, projection=projection)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor held, once, with its name; of a matrix in int8 its values and its scales."""
        yield from _tensors("embedding", self.embedding)
        for index, layer in enumerate(self.layers):
            for field in LayerParameters.__slots__:
                value = getattr(layer, field)
                if value is not None:
                    yield from _tensors(f"layers.{index}.{field}", value)
        if self.projection is not None:
            yield from _tensors("projection.weight", self.projection.matrix)
            for field in ("sink_weight", "bias", "k_norm"):
                value = getattr(self.projection, field)
                if value is not None:
                    yield f"projection.{field}", value
        if self.final_norm is not None:
            yield "final_norm", self.final_norm
        if self.lm_head is not None and self.lm_head is not self.embedding:
            yield from _tensors("lm_head", self.lm_head)

    @property
    def num_bytes(self) -> int:
        """Bytes of all parameters in memory."""
        return sum(tensor.nbytes for _, tensor in self.tensors())


def _held(matrix: Weight, hold: Hold, name: str) -> Weight:
    return hold(matrix, name) if isinstance(matrix, torch.Tensor) else matrix


def _tensors(name: str, held: Weight) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(held, torch.Tensor):
        yield name, held
    elif isinstance(held, PackedMatrix):
        yield name, held.values
    else:
        yield f"{name}.values", held.values
        yield f"{name}.scales", held.scales


class ParameterLoader:
    """Reads one stage's parameters from ``reader``, casting each tensor as it comes.

    With ``hold``, what a step multiplies is held so (``Parameters.held``). If that ``rounds``, prefill's embedding is
    held so, too, where it is decode's head: a prompt begins with the same numbers in both. ``on_progress`` is called
    with (layers done, layers in all) after each layer.
    """

    def __init__(
        self,
        reader: Reader,
        spec: ModelSpec,
        *,
        dtype: torch.dtype,
        device: torch.device,
        hold: Hold | None = None,
        rounds: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._hold = hold
        self._rounds = rounds
        self._reader = reader
        self._spec = spec
        self._dtype = dtype
        self._device = device
        self._on_progress = on_progress or (lambda done, total: None)

    def load(
        self, plan: LayerPlan, stage: Stage, projector: torch.Tensor | None = None, num_sinks: int = 0
    ) -> Parameters:
        """All that ``stage`` needs to serve ``plan``; ``projector`` takes the place of the paper's matrix, for all but
        the first ``num_sinks`` tokens."""
        spec = self._spec
        is_head = spec.tied_embeddings and (stage is Stage.DECODE or self._rounds)
        embedding = self._table("model.embed_tokens.weight", is_head=is_head)
        held = plan.layers_held(stage)
        layers: list[LayerParameters] = []
        skipped: list[LayerProjection] = []
        for index in range(plan.num_layers):
            if index in held:
                layers.append(self._held(index))
            if plan.projects and index in plan.skipped:
                # What is held in another form can't be folded: it's read once more.
                skipped.append(self._skipped(index, layers[index] if index in held and self._hold is None else None))
            self._on_progress(index + 1, plan.num_layers)
        projection = KvProjection(spec, skipped) if skipped else None
        if projection is not None and projector is not None:
            projection = projection.replaced(projector.to(device=self._device, dtype=self._dtype), num_sinks)
        if projection is not None and self._hold is not None:
            projection = projection.held(self._hold)
        if stage is Stage.PREFILL:
            return Parameters(embedding, tuple(layers), projection, None, None)
        head = embedding if spec.tied_embeddings else self._table("lm_head.weight", is_head=True)
        return Parameters(embedding, tuple(layers), projection, self._norm("model.norm.weight"), head)

    def projections(self, plan: LayerPlan) -> list[LayerProjection]:
        """The skipped layers' own norms and matrices, unfolded, for the exact check."""
        return [self._skipped(index, None) for index in plan.skipped]

    def _table(self, name: str, *, is_head: bool) -> Weight:
        """Embedding or lm_head: ``[vocab, hidden]``."""
        table = self._tensor(name, (self._spec.vocab_size, self._spec.hidden_size))
        return self._hold(table, name) if self._hold is not None and is_head else table

    def _held(self, index: int) -> LayerParameters:
        layer = self._layer(index)
        return layer if self._hold is None else layer.held(self._hold, f"layers.{index}")

    def _layer(self, index: int) -> LayerParameters:
        spec, name = self._spec, f"model.layers.{index}."
        attention, mlp = name + "self_attn.", name + "mlp."
        hidden, inner = spec.hidden_size, spec.intermediate_size
        qkv = [("q_proj", spec.q_size), ("k_proj", spec.kv_size), ("v_proj", spec.kv_size)]
        gate_up = [("gate_proj", inner), ("up_proj", inner)]
        # Where a norm follows attention, it has the name that elsewhere the norm before the MLP has.
        before_mlp = "pre_feedforward_layernorm" if spec.post_norms else "post_attention_layernorm"
        return LayerParameters(
            input_norm=self._norm(name + "input_layernorm.weight"),
            qkv=self._fused(attention, qkv, hidden),
            qkv_bias=self._fused_bias(attention, qkv) if spec.qkv_bias else None,
            q_norm=self._head_norm(attention + "q_norm.weight"),
            k_norm=self._head_norm(attention + "k_norm.weight"),
            out=self._tensor(attention + "o_proj.weight", (hidden, spec.q_size)),
            out_bias=self._tensor(attention + "o_proj.bias", (hidden,)) if spec.out_bias else None,
            attention_post_norm=self._post_norm(name + "post_attention_layernorm.weight"),
            mlp_norm=self._norm(f"{name}{before_mlp}.weight"),
            gate_up=self._fused(mlp, gate_up, hidden),
            gate_up_bias=self._fused_bias(mlp, gate_up) if spec.mlp_bias else None,
            down=self._tensor(mlp + "down_proj.weight", (hidden, inner)),
            down_bias=self._tensor(mlp + "down_proj.bias", (hidden,)) if spec.mlp_bias else None,
            mlp_post_norm=self._post_norm(name + "post_feedforward_layernorm.weight"),
        )

    def _skipped(self, index: int, layer: LayerParameters | None) -> LayerProjection:
        spec, name = self._spec, f"model.layers.{index}."
        if layer is not None:  # decode already holds the whole layer
            return layer.projection(spec, index)
        parts = [("k_proj", spec.kv_size), ("v_proj", spec.kv_size)]
        return LayerProjection(
            norm=self._norm(name + "input_layernorm.weight"),
            kv=self._fused(name + "self_attn.", parts, spec.hidden_size),
            bias=self._fused_bias(name + "self_attn.", parts) if spec.qkv_bias else None,
            k_norm=self._head_norm(name + "self_attn.k_norm.weight"),
            rope=spec.layers[index].rope,
        )

    def _norm(self, name: str, width: int | None = None) -> torch.Tensor:
        """A norm's weight. With an offset it's kept in float32 at least: around 1, bfloat16 has 8 bits."""
        weight = self._tensor(name, (width or self._spec.hidden_size,))
        offset = self._spec.norm_offset
        return weight.to(torch.promote_types(weight.dtype, torch.float32)) + offset if offset else weight

    def _head_norm(self, name: str) -> torch.Tensor | None:
        return self._norm(name, self._spec.head_dim) if self._spec.qk_norm else None

    def _post_norm(self, name: str) -> torch.Tensor | None:
        return self._norm(name) if self._spec.post_norms else None

    def _fused(self, prefix: str, parts: list[tuple[str, int]], width: int) -> torch.Tensor:
        return torch.cat([self._tensor(f"{prefix}{part}.weight", (rows, width)) for part, rows in parts])

    def _fused_bias(self, prefix: str, parts: list[tuple[str, int]]) -> torch.Tensor:
        return torch.cat([self._tensor(f"{prefix}{part}.bias", (rows,)) for part, rows in parts])

    def _tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = self._reader.read(name)
        if tuple(tensor.shape) != shape:
            raise MalformedWeights(f"tensor {name} has shape {tuple(tensor.shape)}, the configuration says {shape}")
        return tensor.to(device=self._device, dtype=self._dtype)
