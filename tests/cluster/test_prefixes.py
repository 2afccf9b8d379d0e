"""A prompt that was asked before finds the replicas that know it, in both pools, and what it is shipped are states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from clusters import Look, cluster
from real_prompts import RealPrompt, assert_same_tokens

from shoal.decode.affinity import KEY_TOKENS

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(300)]

BLOCK_TOKENS = 16
NUM_TOKENS = 12
REUSES = {"replicas": 2, "pack_up_to": 0, "reuse": "exact", "block_tokens": BLOCK_TOKENS}


def test_asked_again_a_prompt_is_found_where_it_was(known: Mapping[str, RealPrompt]):
    asked = [prompt for prompt in known.values() if KEY_TOKENS < len(prompt.token_ids) < 400][:4]
    # All that is left is handed off, however little: then prefill, too, finds what it has.
    with cluster(prefill=REUSES, decode=REUSES, handoff={"local_tokens": 0, "wire_mode": "hidden"}) as live:
        looks = [live.look()]
        for _ in range(2):
            for prompt in asked:  # one by one: a replica that is busy would be passed over
                tokens = live.complete({"": prompt.token_ids}, depth="shallow", max_tokens=NUM_TOKENS)[""]
                beginning = replace(prompt.shallow, token_ids=prompt.shallow.token_ids[:NUM_TOKENS])
                assert_same_tokens({prompt.name: tokens}, {prompt.name: beginning})
            looks.append(live.look())
        assert live.num_transfers == 2 * len(asked) and live.num_fallbacks == 0

    def found(before: Look, after: Look, role: str) -> float:
        name = "shoal_prefix_cache_hits_total"
        return after.metric(name, role) - before.metric(name, role)

    # Some begin alike by a few tokens, but none by a key's.
    whole_blocks = [(len(prompt.token_ids) - 1) // BLOCK_TOKENS * BLOCK_TOKENS for prompt in asked]
    assert found(looks[0], looks[1], "decode") < len(asked) * KEY_TOKENS
    assert found(looks[1], looks[2], "decode") >= sum(whole_blocks)
    # Prefill never computes the boundary token, so its last block may be one less.
    assert found(looks[1], looks[2], "prefill") >= sum(whole_blocks) - len(asked) * BLOCK_TOKENS
    assert looks[2].metric("shoal_kv_transfer_bytes_total", part="hidden") > 0
    assert looks[2].metric("shoal_kv_transfer_bytes_total", part="deep") == 0
