"""Negative controls: each part of the method is taken away, on real text, and the damage is measured.

SmolLM2-135M in float32, 10 of 30 layers skipped, by the reference alone. Were a part not needed, or were the
reference to do without it unnoticed, one of these would fail.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import smollm2_reference
from reference import Cache, all_layers, encode_shallow, logits_of, pop_logits, run_layers, token_nlls
from texts import prompts
from torch import Tensor

from shoal.model.files import locate

pytestmark = pytest.mark.slow

NUM_SKIPPED = 10
MAX_TEXT_TOKENS = 400
SPLIT_TOKENS = 100
NUM_CONTINUED = 9


@dataclass(frozen=True)
class Measured:
    """Negative log-likelihoods in nats.

    ``full`` and ``removed`` (the same layers missing at every stage) are of every token of the texts. The others are
    of the ``NUM_CONTINUED`` tokens that follow a prompt, ``[prompts, NUM_CONTINUED]``, one prompt at every
    ``SPLIT_TOKENS`` tokens of a text; ``unbounded`` is of the first alone, as only that one is read off the prompt.
    """

    full: Tensor
    removed: Tensor
    continued: Tensor
    pop: Tensor
    unprojected: Tensor
    unbounded: Tensor


@pytest.fixture(scope="module")
def measured() -> Measured:
    model, tokenizer = smollm2_reference(), locate("smollm2").tokenizer()
    everywhere: list[tuple[Tensor, Tensor]] = []
    after_prompts: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        for text in prompts().values():
            ids = tokenizer.encode(text)[:MAX_TEXT_TOKENS]
            cache: Cache = {}
            shallow = logits_of(model, encode_shallow(model, ids, NUM_SKIPPED, cache))
            full, removed = token_nlls(pop_logits(model, ids, 1, 0), ids[1:]), token_nlls(shallow, ids[1:])
            everywhere.append((full, removed))
            for num_prompt_tokens in range(SPLIT_TOKENS, len(ids) - NUM_CONTINUED + 1, SPLIT_TOKENS):
                first = num_prompt_tokens - 1
                pop, unprojected = continuations(model, ids, num_prompt_tokens, cache)
                after_prompts.append((full[first : first + NUM_CONTINUED], pop, unprojected, removed[first]))
    return Measured(
        *(torch.cat(parts) for parts in zip(*everywhere, strict=True)),
        *(torch.stack(parts) for parts in zip(*after_prompts, strict=True)),
    )


def continuations(model: Any, ids: list[int], num_prompt_tokens: int, cache: Cache) -> Iterator[Tensor]:
    """What ``ids`` after the prompt cost, with and without the projected K/V of ``cache`` (of all ``ids``).

    The prompt's own K/V are the first of those: causal attention makes no difference between them.
    """
    start, end = num_prompt_tokens - 1, num_prompt_tokens + NUM_CONTINUED
    num_kept = len(all_layers(model)) - NUM_SKIPPED
    for layers in (all_layers(model), range(num_kept)):
        held = {index: (cache[index][0][:, :, :start], cache[index][1][:, :, :start]) for index in layers}
        logits = logits_of(model, run_layers(model, ids[start : end - 1], start, all_layers(model), held))
        yield token_nlls(logits, ids[num_prompt_tokens:end])


def test_the_shared_prefix_gives_what_a_prompt_of_its_own_gives():
    """``measured`` encodes each text once; here a prompt is encoded alone, by the reference's own front door."""
    model, ids = smollm2_reference(), locate("smollm2").tokenizer().encode(prompts()["10-science"])[:80]
    cache: Cache = {}
    with torch.no_grad():
        shallow = logits_of(model, encode_shallow(model, ids, NUM_SKIPPED, cache))
        ours = continuations(model, ids, 60, cache)
        for nlls, project in zip(ours, (True, False), strict=True):
            alone = pop_logits(model, ids[:69], 60, NUM_SKIPPED, project=project)
            torch.testing.assert_close(nlls, token_nlls(alone, ids[60:69]), atol=1e-3, rtol=0)
        unbounded = pop_logits(model, ids[:60], 60, NUM_SKIPPED, boundary=False)
        torch.testing.assert_close(shallow[59:60], unbounded, atol=1e-2, rtol=1e-4)
        removed = pop_logits(model, ids, 1, NUM_SKIPPED, remove_everywhere=True)
        torch.testing.assert_close(shallow, removed, atol=1e-2, rtol=1e-4)


def test_the_same_layers_removed_at_every_stage_ruin_the_model(measured: Measured):
    full, removed = (math.exp(nlls.mean()) for nlls in (measured.full, measured.removed))
    print(f"perplexity of {len(measured.full)} tokens: full {full:.1f}, layers removed at every stage {removed:.3g}")
    assert removed >= 1e4 * full


def test_without_kv_projection_what_follows_the_first_token_is_two_nats_worse(measured: Measured):
    """Over all the repo's prompts. How much is lost depends on how much a text takes from its prompt: on finished
    prose it is 1 to 1.5 nats, in tables, logs, settings and code 3 to 4.
    """
    pop, unprojected = measured.pop[:, 1:].mean(), measured.unprojected[:, 1:].mean()
    print(f"tokens 1-8 after {len(measured.pop)} prompts: POP {pop:.2f}, without KV projection {unprojected:.2f} nats")
    assert unprojected >= pop + 2


def test_without_a_boundary_token_the_first_token_is_five_nats_worse(measured: Measured):
    pop, unbounded = measured.pop[:, 0].mean(), measured.unbounded.mean()
    print(f"first token after {len(measured.pop)} prompts: POP {pop:.2f}, without boundary token {unbounded:.2f} nats")
    assert unbounded >= pop + 5


def test_what_the_method_itself_loses_is_far_less(measured: Measured):
    """The controls mean something only where the method holds: within 0.5 nats of full depth on the same tokens."""
    full, pop = measured.continued.mean(), measured.pop.mean()
    print(f"tokens 0-8 after {len(measured.pop)} prompts: full {full:.2f}, POP {pop:.2f} nats")
    assert pop <= full + 0.5
