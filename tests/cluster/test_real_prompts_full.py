"""Some of the twenty prompts through both pools of a deployment that skips nothing."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from clusters import cluster
from real_prompts import NUM_TOKENS, RealPrompt, assert_same_tokens, ids_of, references

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]


def test_nothing_skipped_both_pools_together_are_transformers_own(known: Mapping[str, RealPrompt]):
    known = {name: known[name] for name in sorted(known)[1:18:5]}
    with cluster(model={"skip_layers": 0}) as full:
        answers = full.ask(ids_of(known), max_tokens=NUM_TOKENS)
        tokens = {name: answer["shoal"]["choices"][0]["token_ids"] for name, answer in answers.items()}
        assert_same_tokens(tokens, references(known, "full"))
        assert full.num_transfers == len(known) and full.num_fallbacks == 0
        assert all(answer["usage"]["depth"] == "full" for answer in answers.values())
