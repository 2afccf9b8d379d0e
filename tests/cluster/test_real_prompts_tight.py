"""The same twenty prompts where there are too few blocks for them all, and chunks are small."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from clusters import cluster
from real_prompts import NUM_TOKENS, RealPrompt, assert_same_tokens, ids_of, references

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

# K/V of half of the tokens that all twenty hold together when they end.
HALF_THE_LOAD_BLOCKS = 350


def test_small_chunks_and_forced_preemption_change_nothing(known: Mapping[str, RealPrompt]):
    with cluster(prefill={"max_step_tokens": 100}, decode={"num_blocks": HALF_THE_LOAD_BLOCKS}) as tight:
        tokens = tight.complete(ids_of(known), depth="shallow", max_tokens=NUM_TOKENS)
        assert_same_tokens(tokens, references(known, "shallow"))
        assert tight.metric("shoal_preemptions_total", role="decode") > 0
        assert tight.num_transfers > 0 and tight.num_fallbacks == 0
