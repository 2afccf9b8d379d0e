"""Both pools with weights in int8: served over a hand-off, and what they say is what such weights say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from clusters import cluster
from engines import native_kernels
from int8 import dequantized, shallow_logits
from models import smollm2_reference
from real_prompts import NUM_SKIPPED, RealPrompt

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]

NUM_TOKENS = 16
INT8 = {"weights": "int8"}


def test_both_pools_hold_int8_and_say_what_such_weights_say(known: Mapping[str, RealPrompt]) -> None:
    native_kernels()  # skips where there are none: int8 is theirs alone
    asked = sorted(known.values(), key=lambda prompt: len(prompt.token_ids))[2:5]
    # All is handed off, however short.
    with cluster(model={"dtype": "bfloat16"}, prefill=INT8, decode=INT8, handoff={"local_tokens": 0}) as live:
        answers = live.ask(
            {prompt.name: prompt.token_ids for prompt in asked}, depth="shallow", max_tokens=NUM_TOKENS, logprobs=1
        )
        assert live.num_transfers == len(asked) and live.num_fallbacks == 0
        decode = live.describe()
    prefill = decode["prefill"]
    assert prefill["parameter_bytes"] < decode["parameter_bytes"] < 0.55 * prefill["full_model_bytes"]

    rounded = dequantized(smollm2_reference())

    def off(num_skipped: int) -> float:
        """How far tokens' log-probabilities are, on average, from what float32 gives them on the same weights."""
        differences = [_differences(rounded, prompt.token_ids, answers[prompt.name], num_skipped) for prompt in asked]
        return float(torch.cat(differences).mean())

    # Activations in bfloat16 and rounded inputs: 0.06 was seen. Were nothing projected, it would be another answer.
    assert off(NUM_SKIPPED) < 0.12
    assert off(0) > 0.2


def _differences(model: Any, prompt: Sequence[int], answer: dict[str, Any], num_skipped: int) -> torch.Tensor:
    [choice], [said] = answer["shoal"]["choices"], answer["choices"]
    tokens = choice["token_ids"]
    logits = shallow_logits(model, model, [*prompt, *tokens[:-1]], len(prompt), num_skipped)
    expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return (torch.tensor(said["logprobs"]["token_logprobs"]) - expected).abs()
