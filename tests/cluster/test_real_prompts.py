"""Twenty real prompts through real processes: every token equals the reference's, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
from clusters import TestCluster, cluster
from real_prompts import NUM_TOKENS, RealPrompt, assert_same_tokens, ids_of, references

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def shallow(known: Mapping[str, RealPrompt]) -> Iterator[TestCluster]:
    with cluster() as live:
        yield live


def test_all_at_once_shallow_prompts_through_both_pools_are_the_papers(
    shallow: TestCluster, known: Mapping[str, RealPrompt]
):
    before = shallow.num_transfers
    answers = shallow.ask(ids_of(known), depth="shallow", max_tokens=NUM_TOKENS)
    tokens = {name: answer["shoal"]["choices"][0]["token_ids"] for name, answer in answers.items()}
    assert_same_tokens(tokens, references(known, "shallow"))
    assert all(answer["usage"]["depth"] == "shallow" for answer in answers.values())
    assert shallow.num_transfers - before == len(known)
    assert shallow.num_fallbacks == 0
    shallow.assert_nothing_held()


@pytest.mark.long
def test_all_at_once_full_depth_on_a_shallow_deployment_is_transformers_own(
    shallow: TestCluster, known: Mapping[str, RealPrompt]
):
    before = shallow.num_transfers
    tokens = shallow.complete(ids_of(known), depth="full", max_tokens=NUM_TOKENS)
    assert_same_tokens(tokens, references(known, "full"))
    assert shallow.num_transfers == before, "decode prefills at full depth itself"
    shallow.assert_nothing_held()


@pytest.mark.parametrize("depth", ["shallow", "full"])
def test_one_by_one_is_the_same(shallow: TestCluster, known: Mapping[str, RealPrompt], depth: str):
    some = {name: known[name] for name in sorted(known)[6::10]}
    before = shallow.num_transfers
    tokens: dict[str, list[int]] = {}
    for name, prompt in some.items():
        tokens |= shallow.complete({name: prompt.token_ids}, depth=depth, max_tokens=NUM_TOKENS)
    assert_same_tokens(tokens, references(some, depth))
    assert shallow.num_transfers - before == (len(some) if depth == "shallow" else 0)
    assert shallow.num_fallbacks == 0
    shallow.assert_nothing_held()
