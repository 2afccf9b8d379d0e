"""A SPEED plan through real processes: the chat template says which tokens are anchors and header."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from clusters import cluster
from models import smollm2_reference
from real_prompts import assert_same_tokens
from reference import speed_generate

from shoal.model.files import locate

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.slow, pytest.mark.timeout(300)]

NUM_TOKENS = 16
MESSAGES = [
    {"role": "system", "content": "You answer in one short sentence."},
    {"role": "user", "content": "Why do ships need lighthouses when the weather is bad?"},
]


def test_a_chat_s_system_prompt_is_its_anchors_and_no_deep_layer_is_shipped():
    tokenizer = locate("smollm2").tokenizer()
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    system = tokenizer.encode(f"<|im_start|>system\n{MESSAGES[0]['content']}<|im_end|>\n<|im_start|>user\n")
    assert ids[: len(system)] == system
    num_header = len(tokenizer.encode("<|im_start|>assistant\n"))
    with cluster(model={"plan": "speed", "anchors": "system"}) as live:
        body = {
            "model": live.model, "messages": MESSAGES, "temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True,
            "logprobs": True, "top_logprobs": 2,
        }  # fmt: skip
        answer = httpx.post(
            f"{live.url}/v1/chat/completions", json=body, headers={"x-shoal-timing": "1"}, timeout=120
        ).json()
        look = live.look()
        assert live.num_transfers == 1 and live.num_fallbacks == 0
        assert look.metric("shoal_kv_transfer_bytes_total", part="shallow") > 0
        assert look.metric("shoal_kv_transfer_bytes_total", part="deep") == 0

    model = smollm2_reference()
    expected = speed_generate(model, ids, NUM_TOKENS, 10, num_anchors=len(system), num_last=num_header)
    assert_same_tokens({"chat": answer["shoal"]["choices"][0]["token_ids"]}, {"chat": expected})
    gaps = [gap(step["top_logprobs"]) for step in answer["choices"][0]["logprobs"]["content"]]
    assert gaps == pytest.approx(expected.gaps, abs=1e-3)
    # Were the system prompt no anchor, or the header shallow, it would be another distribution.
    for other in ({"num_anchors": 1, "num_last": num_header}, {"num_anchors": len(system), "num_last": 1}):
        assert gaps != pytest.approx(speed_generate(model, ids, NUM_TOKENS, 10, **other).gaps, abs=0.1)


def gap(best: list[dict[str, Any]]) -> float:
    return float(best[0]["logprob"] - best[1]["logprob"])
