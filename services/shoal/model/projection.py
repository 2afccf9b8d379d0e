"""K/V of the skipped layers, projected from the state that left the last kept layer (POP, section 3).

For a skipped layer ``l`` and ``h = x_K``: ``k_l = RoPE(LN_l(h) W_l^K)``, ``v_l = LN_l(h) W_l^V``. RMSNorm is a
per-token scale times a per-channel weight, so the channel weight folds into the matrix and what is left of the norm is
the same for all layers: ``n(h) = h / sqrt(mean h^2 + eps)``. All skipped layers' K/V are then one GEMM,
``[tokens, hidden] x [hidden, S * 2 * kv_size]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from shoal.model.families import ModelSpec
from shoal.model.norm import rms_norm
from shoal.model.rope import Rope


@dataclass(frozen=True, slots=True)
class LayerProjection:
    """One skipped layer's own parameters: input norm ``[hidden]``, ``k_proj|v_proj`` ``[2 * kv_size, hidden]``, and
    their bias ``[2 * kv_size]`` or ``None``."""

    norm: torch.Tensor
    kv: torch.Tensor
    bias: torch.Tensor | None


class KvProjection:
    """The projection of all skipped layers as one matrix ``[S * 2 * kv_size, hidden]``."""

    def __init__(self, spec: ModelSpec, layers: Sequence[LayerProjection]) -> None:
        self._spec = spec
        self.num_layers = len(layers)
        # Folded in float32 at least: rounding the product once is better than rounding both factors.
        wide = [layer.kv.to(_wide(layer.kv.dtype)) * layer.norm.to(_wide(layer.kv.dtype)) for layer in layers]
        self.weight = torch.cat(wide).to(layers[0].kv.dtype)
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None

    @property
    def num_bytes(self) -> int:
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)

    def __call__(self, hidden: torch.Tensor, rope: Rope) -> torch.Tensor:
        """``hidden`` ``[tokens, hidden]`` -> K/V ``[S, tokens, 2, kv_heads, head_dim]`` (a strided view)."""
        spec = self._spec
        flat = F.linear(rms_norm(hidden, None, spec.norm_eps), self.weight, self.bias)
        kv = flat.view(hidden.shape[0], self.num_layers, 2, spec.num_kv_heads, spec.head_dim)
        rope.rotate_(kv[:, :, 0])
        return kv.transpose(0, 1)


def project_unfolded(
    spec: ModelSpec, layers: Sequence[LayerProjection], hidden: torch.Tensor, rope: Rope
) -> torch.Tensor:
    """The same, layer by layer as the paper writes it: the exact check of the folded matrix."""
    projected = []
    for layer in layers:
        normed = rms_norm(hidden, layer.norm, spec.norm_eps)
        kv = F.linear(normed, layer.kv, layer.bias).view(hidden.shape[0], 2, spec.num_kv_heads, spec.head_dim)
        rope.rotate_(kv[:, 0])
        projected.append(kv)
    return torch.stack(projected)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
