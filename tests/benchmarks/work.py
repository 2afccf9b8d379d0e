"""What answering a prompt costs at the very least, in arithmetic and in bytes: to set beside a machine's limits."""

from __future__ import annotations

from shoal.model.families import ModelSpec
from shoal.model.plan import LayerPlan


def prefill_flops(spec: ModelSpec, plan: LayerPlan, num_tokens: int) -> int:
    """Of a prompt until its first token's logits: the boundary token at full depth, logits of the last token alone.

    Attention counts what is seen, not the square that a kernel may compute; norms and activations count nothing.
    """
    kv = 2 * spec.kv_size * spec.hidden_size
    weights = _layer_weights(spec)
    layer = 2 * weights * num_tokens + 2 * spec.q_size * num_tokens * (num_tokens + 1)
    skipped = 2 * kv * (num_tokens - 1) + 2 * weights + 4 * spec.q_size * num_tokens
    return plan.num_kept * layer + plan.num_skipped * skipped + 2 * spec.vocab_size * spec.hidden_size


def weight_bytes(spec: ModelSpec, element_bytes: int = 2) -> int:
    """All matrices that a step reads whole. Of the embedding it reads them as the head, tied or not."""
    matrices = spec.num_layers * _layer_weights(spec) + spec.vocab_size * spec.hidden_size
    return matrices * element_bytes


def _layer_weights(spec: ModelSpec) -> int:
    kv = 2 * spec.kv_size * spec.hidden_size
    return 2 * spec.q_size * spec.hidden_size + kv + 3 * spec.intermediate_size * spec.hidden_size
