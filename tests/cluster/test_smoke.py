"""Two pools as a user meets them: the right tokens, whoever dies or leaves meanwhile, and nothing held after it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping

import pytest
from answers import Answer, ask, connected, has_first_chunk, holders, until
from clusters import END_WITHIN_S, TestCluster, cluster, rise
from real_prompts import NUM_TOKENS, RealPrompt, assert_same_tokens, ids_of, references

pytestmark = [pytest.mark.cluster, pytest.mark.smoke, pytest.mark.timeout(300)]

# Chunks are so small that a prompt takes dozens: there is time to see the first, and to kill before the last.
PREFILL = {"replicas": 2, "pack_up_to": 0, "max_step_tokens": 32}
DECODE = {"replicas": 2, "pack_up_to": 0}


@pytest.fixture(scope="module")
def live() -> Iterator[TestCluster]:
    with cluster(prefill=PREFILL, decode=DECODE) as found:
        yield found


@pytest.fixture(autouse=True)
def whole(live: TestCluster) -> Iterator[None]:
    """Each test begins and ends with every replica there, and nothing held."""
    yield
    live.await_whole()
    live.assert_nothing_held(END_WITHIN_S)


@pytest.fixture(scope="module")
def long(known: Mapping[str, RealPrompt]) -> RealPrompt:
    return max(known.values(), key=lambda prompt: len(prompt.token_ids))


def test_a_prompt_that_was_handed_off_is_answered_as_the_reference_does(
    live: TestCluster, known: Mapping[str, RealPrompt]
):
    some = {name: known[name] for name in sorted(known)[:4]}
    before = live.look()
    answers = live.complete(ids_of(some), max_tokens=NUM_TOKENS)
    assert_same_tokens(answers, references(some, "shallow"))
    after = live.look()
    assert rise(before, after, "shoal_kv_transfer_seconds_count") == len(some)
    assert rise(before, after, "shoal_kv_fallback_total") == 0


def test_prefill_dies_after_its_first_chunk_and_the_other_replica_takes_over(live: TestCluster, long: RealPrompt):
    async def run() -> None:
        async with connected(live) as client:
            asked = asyncio.create_task(ask(client, Answer(long, num_tokens=16)))
            look = await until(live, asked, has_first_chunk(before))
            [working] = holders(look, "shoal_kv_pinned_bytes", role="prefill")
            live.kill(working)
            (await asked).assert_right()

    before = live.look()
    asyncio.run(run())
    live.await_whole()
    after = live.look()
    assert rise(before, after, "shoal_kv_fallback_total", rung="other_replica", reason="peer_gone") == 1
    assert rise(before, after, "shoal_kv_transfer_seconds_count") == 1


def test_decode_dies_in_the_midst_of_an_answer_and_the_other_replica_goes_on(live: TestCluster, long: RealPrompt):
    async def run() -> None:
        async with connected(live) as client:
            asked = asyncio.create_task(ask(client, Answer(long, num_tokens=60)))
            look = await until(live, asked, lambda look: rise(before, look, "shoal_decode_tokens_total") > 4)
            [working] = holders(look, "shoal_kv_blocks", role="decode", state="used")
            live.kill(working)
            (await asked).assert_right()

    before = live.look()
    asyncio.run(run())
    live.await_whole()
    after = live.look()
    assert rise(before, after, "shoal_resumes_total") == 1
    assert rise(before, after, "shoal_requests_total", status="200") == 1


def test_a_client_that_leaves_gives_back_all_it_held(live: TestCluster, long: RealPrompt):
    async def run() -> None:
        async with connected(live) as client:
            asked = asyncio.create_task(ask(client, Answer(long, num_tokens=60)))
            await until(live, asked, has_first_chunk(before))
            asked.cancel()

    before = live.look()
    asyncio.run(run())
    live.assert_nothing_held()  # within two seconds, and a little for looking
