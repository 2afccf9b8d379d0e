"""The decoder's operations on a GPU by Shoal's own Triton kernels; products, and attention of prompts, are torch's."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch

from shoal.backends.attention import attend, attend_prompt
from shoal.backends.gpu.gpu_trial import GpuTrial
from shoal.errors import ConfigError
from shoal.model.batch import AttentionPlan
from shoal.model.decoder import Decoder
from shoal.model.families import Activation, ModelSpec
from shoal.model.kv_pool import KvPool
from shoal.model.matrix import Weight
from shoal.model.parameters import Parameters
from shoal.model.plan import LayerPlan
from shoal.model.rope import Rope
from shoal.model.rows import TorchRows
from shoal.wire.messages import Stage

# Of numbers around one. torch's own operators in bfloat16 were up to 0.022 off float64 there; what is wrong, by more.
_MOST_OFF = 0.05


class GpuAttention:
    """Carries out ``Attend``: single rows by a kernel over the pool itself, prompts by torch's fused ones. ``kernel``
    is the module shoal.backends.gpu.paged_attention; what it doesn't take, torch does."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

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
        if not reads.groups or not self._kernel.takes(queries, held):
            return attend(queries, pool, layer, reads, scale=scale, softcap=softcap)
        mixed = queries.new_empty(queries.shape)
        for segment in reads.prompts:
            rows = slice(segment.row_start, segment.row_end)
            mixed[rows] = attend_prompt(queries[rows], pool, layer, segment, scale, softcap)
        for group in reads.groups:
            self._kernel.attend_rows(
                queries, group.rows, held, group.context, group.longest, group.lengths, mixed,
                scale=scale, softcap=softcap,
            )  # fmt: skip
        return mixed


class GpuRows(TorchRows):
    """Carries out ``RowOps``. ``kernel`` is the module gpu_rows; what it doesn't take, torch does."""

    def __init__(self, spec: ModelSpec, kernel: Any) -> None:
        super().__init__(spec)
        self._kernel = kernel
        self._is_gelu = spec.activation is not Activation.SILU

    def norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if not self._norms(hidden, weight):
            return super().norm(hidden, weight)
        flat = hidden.reshape(-1, hidden.shape[-1]).contiguous()  # one head of several is a view that isn't
        normed: torch.Tensor = self._kernel.add_norm(flat, None, weight, self._spec.norm_eps)[1]
        return normed.view(hidden.shape)

    def add_norm(
        self, hidden: torch.Tensor, added: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not (self._norms(hidden, added, weight) and hidden.is_contiguous() and added.is_contiguous()):
            return super().add_norm(hidden, added, weight)
        total, normed = self._kernel.add_norm(hidden, added, weight, self._spec.norm_eps)
        return total, normed

    def _norms(self, hidden: torch.Tensor, *others: torch.Tensor) -> bool:
        is_small = 0 < hidden.shape[-1] <= self._kernel.MAX_HIDDEN
        return bool(is_small and hidden.numel() and self._kernel.takes(hidden, *others))

    def rotate_and_store(
        self, heads: torch.Tensor, rope: Rope, table: int, pool: KvPool, layer: int, slots: torch.Tensor
    ) -> torch.Tensor:
        num_heads, held = self._spec.num_heads, pool.layers[layer]
        cos, sin = rope.cos[table], rope.sin[table]
        is_plain = heads.stride()[1:] == (heads.shape[2], 1) and cos.is_contiguous() and sin.is_contiguous()
        if not (heads.numel() and is_plain and self._kernel.takes(heads, cos, sin, held)):
            return super().rotate_and_store(heads, rope, table, pool, layer, slots)
        self._kernel.rotate_store(heads, num_heads, cos, sin, held, slots)
        return heads[:, :num_heads]

    def gated(self, inputs: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
        gate_up = self.linear(inputs, weight, bias)
        if not (gate_up.numel() and gate_up.is_contiguous() and self._kernel.takes(gate_up)):
            return self._gated(gate_up)
        gated: torch.Tensor = self._kernel.gate(gate_up, is_gelu=self._is_gelu)
        return gated


@dataclass(frozen=True, slots=True)
class GpuKernels:
    """What a decoder on a GPU is made with."""

    attention: GpuAttention
    rows: GpuRows

    def decoder(self, spec: ModelSpec, plan: LayerPlan, stage: Stage, parameters: Parameters) -> Decoder:
        return Decoder(spec, plan, stage, parameters, self.attention, self.rows)


def find_gpu_kernels(spec: ModelSpec, dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device) -> GpuKernels:
    """Compiles what ``spec`` needs, and tries it. Raises ConfigError that says why torch must compute: Triton isn't
    there, or can't compile (it wants a C compiler, and a folder to write to), or what it compiled is wrong."""
    try:
        attention, rows = (
            importlib.import_module(f"shoal.backends.gpu.{name}") for name in ("paged_attention", "gpu_rows")
        )
    except ImportError as error:
        raise ConfigError(f"Triton can't be imported: {error}") from error
    found, trial = GpuKernels(GpuAttention(attention), GpuRows(spec, rows)), GpuTrial(spec, dtype, kv_dtype, device)
    try:
        is_taken = attention.takes(trial.queries(1), trial.pool(1).layers[0])
        most_off = trial.most_off(found.attention, found.rows) if is_taken else 0.0
    except Exception as error:  # Triton's, its compilers' and the driver's own, of many kinds
        raise ConfigError(f"Triton's kernels can't be run: {error}") from error
    if not is_taken:
        raise ConfigError(f"Triton's kernels take no heads of {spec.head_dim} numbers in {dtype}, K/V in {kv_dtype}")
    if not most_off < _MOST_OFF:  # nor where it's no number
        raise ConfigError(f"Triton's kernels, tried once, were {most_off:.2g} off what torch gives")
    return found
