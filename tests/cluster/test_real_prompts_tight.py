"""Some of the twenty prompts where there are too few blocks for them all, and chunks are small."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from clusters import cluster
from real_prompts import NUM_TOKENS, RealPrompt, assert_same_tokens, ids_of, references

from shoal.telemetry.labels import HandoffReason

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.slow, pytest.mark.timeout(900)]

# The longest alone needs 97. How many of them run at once is the machine's affair;
# that sixteen choices of one end with 145 is not.
NUM_BLOCKS = 120
NUM_CHOICES, NUM_CHOICE_TOKENS = 16, 128


def test_small_chunks_and_forced_preemption_change_nothing(known: Mapping[str, RealPrompt]):
    known = {name: known[name] for name in sorted(known)[2:19:8]}
    with cluster(prefill={"max_step_tokens": 100}, decode={"max_step_tokens": 100, "num_blocks": NUM_BLOCKS}) as tight:
        tokens = tight.complete(ids_of(known), depth="shallow", max_tokens=NUM_TOKENS)
        assert_same_tokens(tokens, references(known, "shallow"))
        preempted_before = tight.metric("shoal_preemptions_total", role="decode")
        short = min(known.values(), key=lambda prompt: len(prompt.token_ids))
        answer = tight.ask({"": short.token_ids}, depth="shallow", max_tokens=NUM_CHOICE_TOKENS, n=NUM_CHOICES)[""]
        choices = {f"choice {one['index']}": one["token_ids"] for one in answer["shoal"]["choices"]}
        assert len(choices) == NUM_CHOICES
        beginnings = {name: token_ids[:NUM_TOKENS] for name, token_ids in choices.items()}
        assert_same_tokens(beginnings, dict.fromkeys(choices, short.shallow))
        assert tight.metric("shoal_preemptions_total", role="decode") > preempted_before
        assert tight.num_transfers > 0
        # Leases that nobody had claimed yet may give their blocks to older sequences; nothing else may go wrong.
        look = tight.look()
        others = {reason: look.metric("shoal_kv_fallback_total", reason=reason) for reason in HandoffReason}
        assert not {reason: number for reason, number in others.items() if number and reason != "out_of_blocks"}
