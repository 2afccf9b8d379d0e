"""Responses that a model gives by itself: drawn from its whole distribution, at temperature 1.

Any restriction (top-k, top-p, another temperature) would be another distribution than the one that the loss scores,
and the expected gradient, which is 0 at the model's own, would not vanish (method: arXiv 2602.03295, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.backends.chooser import SampleRow
from shoal.engine.sampler import sample
from shoal.wire.messages import SamplingParams
from shoal_lab.quality.gated import GatedModel


def draw_response(
    model: GatedModel, prompt: Sequence[int], *, choice: int, seed: int, max_tokens: int, eos_token_ids: Sequence[int]
) -> tuple[int, ...]:
    """At least one token, at most ``max_tokens``; one of ``eos_token_ids`` ends it and is part of it.

    Each token depends on (seed, choice, its index) and on what comes before, on nothing else.
    """
    params = SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=seed)
    cache = model.new_cache()
    response: list[int] = []
    following = list(prompt)
    while len(response) < max_tokens:
        logits = model.next_logits(following, cache)
        token_id = sample(logits, [SampleRow(params, choice, len(response), 0)])[0].token_id
        response.append(token_id)
        if token_id in eos_token_ids:
            break
        following = [token_id]
    return tuple(response)
