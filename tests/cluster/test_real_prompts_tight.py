"""The same twenty prompts where there are too few blocks for them all, and chunks are small."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from clusters import cluster
from real_prompts import NUM_TOKENS, RealPrompt, assert_same_tokens, ids_of, references

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

# All twenty together end with 700 blocks, those that run at once (the short ones, while a long one is prefilled)
# with 240 or so. The longest alone needs 97.
NUM_BLOCKS = 120


def test_small_chunks_and_forced_preemption_change_nothing(known: Mapping[str, RealPrompt]):
    with cluster(prefill={"max_step_tokens": 100}, decode={"max_step_tokens": 100, "num_blocks": NUM_BLOCKS}) as tight:
        tokens = tight.complete(ids_of(known), depth="shallow", max_tokens=NUM_TOKENS)
        assert_same_tokens(tokens, references(known, "shallow"))
        assert tight.metric("shoal_preemptions_total", role="decode") > 0
        assert tight.num_transfers > 0
        # Leases that nobody had claimed yet may give their blocks to older sequences; nothing else may go wrong.
        assert tight.num_fallbacks == tight.metric("shoal_kv_fallback_total", reason="out_of_blocks")
