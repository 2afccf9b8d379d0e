"""Twenty real prompts through real processes: every token equals the reference's, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

from clusters import TestCluster, cluster
from real_prompts import NUM_TOKENS, RealPrompt, assert_same_tokens, real_prompts
from reference import Generated

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

# Twice as many tokens' K/V as the pool holds when all twenty run at once.
HALF_THE_LOAD_BLOCKS = 350


@pytest.fixture(scope="module")
def known() -> Mapping[str, RealPrompt]:
    found = {prompt.name: prompt for prompt in real_prompts()}
    lengths = sorted(len(prompt.token_ids) for prompt in found.values())
    assert len(lengths) == 20 and lengths[0] >= 20 and lengths[-1] <= 1500 and lengths[-4] > 1000
    return found


@pytest.fixture(scope="module")
def shallow(known: Mapping[str, RealPrompt]) -> Iterator[TestCluster]:
    with cluster() as live:
        yield live


def ids_of(known: Mapping[str, RealPrompt]) -> dict[str, tuple[int, ...]]:
    return {name: prompt.token_ids for name, prompt in known.items()}


def references(known: Mapping[str, RealPrompt], depth: str) -> dict[str, Generated]:
    return {name: getattr(prompt, depth) for name, prompt in known.items()}


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
    some = {name: known[name] for name in sorted(known)[::4]}
    tokens: dict[str, list[int]] = {}
    for name, prompt in some.items():
        tokens |= shallow.complete({name: prompt.token_ids}, depth=depth, max_tokens=NUM_TOKENS)
    assert_same_tokens(tokens, references(some, depth))
    assert shallow.num_fallbacks == 0


def test_small_chunks_and_forced_preemption_change_nothing(known: Mapping[str, RealPrompt]):
    with cluster(prefill={"max_step_tokens": 100}, decode={"num_blocks": HALF_THE_LOAD_BLOCKS}) as tight:
        tokens = tight.complete(ids_of(known), depth="shallow", max_tokens=NUM_TOKENS)
        assert_same_tokens(tokens, references(known, "shallow"))
        assert tight.metric("shoal_preemptions_total", role="decode") > 0
        assert tight.num_transfers > 0 and tight.num_fallbacks == 0


def test_nothing_skipped_both_pools_together_are_transformers_own(known: Mapping[str, RealPrompt]):
    with cluster(model={"skip_layers": 0}) as full:
        answers = full.ask(ids_of(known), max_tokens=NUM_TOKENS)
        tokens = {name: answer["shoal"]["choices"][0]["token_ids"] for name, answer in answers.items()}
        assert_same_tokens(tokens, references(known, "full"))
        assert full.num_transfers == len(known) and full.num_fallbacks == 0
        assert all(answer["usage"]["depth"] == "full" for answer in answers.values())
