"""Replicas die, drain and lose their clients in the midst of work: no wrong token, no lost request, nothing held."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import threading
import time
from collections import ChainMap
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from answers import Answer, ask, ask_grpc, ask_whole, connected, has_first_chunk, holders, until
from clusters import END_WITHIN_S, MOMENT_S, Look, TestCluster, cluster, rise
from real_prompts import NUM_TOKENS, RealPrompt, assert_same_tokens, references

from shoal.client import AsyncClient
from shoal.cluster.ports import free_port

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

# Both replicas of a pool get work, though they share cores here, as they wouldn't elsewhere. And chunks are so small
# that a long prompt takes dozens: there is time to see the first, and to kill before the last.
DECODE: dict[str, int] = {"replicas": 2, "pack_up_to": 0}
PREFILL = {**DECODE, "max_step_tokens": 32}


@pytest.fixture(scope="module")
def live() -> Iterator[TestCluster]:
    gateway = {"grpc_port": free_port("127.0.0.1")}
    with cluster(can_hang=True, prefill=PREFILL, decode=DECODE, gateway=gateway) as found:
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


@pytest.mark.long
def test_both_prefill_replicas_die_and_decode_computes_the_prompt(live: TestCluster, long: RealPrompt):
    async def run() -> None:
        async with connected(live) as client:
            asked = asyncio.create_task(ask(client, Answer(long, num_tokens=16)))
            look = await until(live, asked, has_first_chunk(before))
            [working] = holders(look, "shoal_kv_pinned_bytes", role="prefill")
            idle = look.each("shoal_kv_pinned_bytes", role="prefill").keys() - {working}
            for replica_id in (*idle, working):
                live.kill(replica_id)
            (await asked).assert_right()

    before = live.look()
    asyncio.run(run())
    live.await_whole()
    after = live.look()
    # Decode may hear of the second death only when it turns there, and then find the replica that replaces it.
    num_local = rise(before, after, "shoal_kv_fallback_total", rung="local")
    assert num_local + rise(before, after, "shoal_kv_transfer_seconds_count") == 1
    assert rise(before, after, "shoal_kv_fallback_total", rung="unavailable") == 0
    sessions = after.each("shoal_kv_sessions_total", role="prefill")
    came = sessions.keys() - before.each("shoal_kv_sessions_total", role="prefill").keys()
    assert [sessions[new] for new in came] == [2.0] * 2  # it has greeted both before it's asked for a prompt


def test_no_replica_that_crashes_leaves_a_dump(live: TestCluster):
    for entry in live.live.replica_entries():
        limits = Path(f"/proc/{entry.pid}/limits").read_text(encoding="ascii").splitlines()
        [(soft, hard)] = [line.split()[4:6] for line in limits if line.startswith("Max core file size")]
        assert soft == ("0" if hard == "0" else "1"), entry


def test_decode_replicas_of_the_same_cores_know_of_one_another(live: TestCluster):
    """By a file that all of them have open, and nobody else."""
    opened: dict[str, list[set[Path]]] = {}
    for entry in live.live.replica_entries():
        files = set()
        for file in Path(f"/proc/{entry.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed just now
                files.add(file.readlink())
        opened.setdefault(entry.role, []).append({file for file in files if file.name == "neighbours"})
    one, other = opened.pop("decode")
    assert one == other and len(one) == 1
    assert not any(itertools.chain(*opened.values()))


def test_decode_dies_before_the_first_token(live: TestCluster, long: RealPrompt):
    """The other decode replica runs the request again, and the client notices nothing."""

    async def run() -> None:
        async with connected(live) as client:
            asked = asyncio.create_task(ask(client, Answer(long, num_tokens=16)))
            look = await until(live, asked, has_first_chunk(before))
            [working] = holders(look, "shoal_kv_leases", role="decode", state="streaming")
            live.kill(working)
            (await asked).assert_right()

    before = live.look()
    asyncio.run(run())
    live.await_whole()
    assert rise(before, live.look(), "shoal_retries_total", reason="peer_gone") == 1


@pytest.mark.long
def test_decode_dies_in_the_midst_of_an_answer_that_is_sent_whole(live: TestCluster, long: RealPrompt):
    answer = Answer(long, num_tokens=60)

    async def run() -> None:
        async with connected(live) as client:
            asked = asyncio.create_task(ask_whole(client, answer))
            look = await until(live, asked, lambda look: rise(before, look, "shoal_decode_tokens_total") > 4)
            [working] = holders(look, "shoal_kv_blocks", role="decode", state="used")
            live.kill(working)
            (await asked).assert_right()

    before = live.look()
    asyncio.run(run())
    live.await_whole()
    assert rise(before, live.look(), "shoal_resumes_total") == 1


UNREADY_WITHIN_S = 5.0
# Serve asks for a replica's health once a second, waits for five, and gives up after three times.
GONE_WITHIN_S = 30.0


def forgotten(live: TestCluster, role: Any, num_left: int, within_s: float = UNREADY_WITHIN_S) -> None:
    """Wait until the directory lists no more than ``num_left``: who isn't there gets no more work."""
    deadline_s = time.monotonic() + within_s
    while len(live.live.replica_entries(role)) > num_left:
        assert time.monotonic() < deadline_s
        threading.Event().wait(MOMENT_S)


@pytest.fixture(scope="module")
def some(known: Mapping[str, RealPrompt]) -> dict[str, RealPrompt]:
    """Together under way for longer than it takes to notice two hangs."""
    names = sorted(known, key=lambda name: len(known[name].token_ids))[5:13]
    return {name: known[name] for name in names}


@contextmanager
def both_at_work(
    live: TestCluster, some: Mapping[str, RealPrompt], num_tokens: int = NUM_TOKENS
) -> Iterator[list[Future[dict[str, list[int]]]]]:
    """Within the block, both decode replicas answer; whatever happens there, every token is the reference's."""
    asked = partial(live.complete, max_tokens=num_tokens, depth="shallow")
    with ThreadPoolExecutor(len(some)) as threads:
        answers: list[Future[dict[str, list[int]]]] = []
        for name, prompt in some.items():
            answers.append(threads.submit(asked, {name: list(prompt.token_ids)}))
            # Serve would send a burst to whichever replica it last heard of; between looks it hears of both.
            live.look()
        while len(holders(live.look(), "shoal_kv_blocks", role="decode", state="used")) < 2:
            assert not all(answer.done() for answer in answers), "all were answered before anything could happen to it"
            threading.Event().wait(MOMENT_S)
        yield answers
        told = dict(ChainMap(*(answer.result() for answer in answers)))
        expected = references(some, "shallow").items()
        assert_same_tokens(told, {name: replace(one, token_ids=one.token_ids[:num_tokens]) for name, one in expected})


def test_replicas_that_live_and_hang_are_replaced_within_seconds(live: TestCluster, some: dict[str, RealPrompt]):
    """A decode replica's engine and a prefill replica's event loop: others finish what they had."""
    from ray import serve  # not before the cluster has set Ray's environment

    prefill = {entry.replica_id for entry in live.live.replica_entries("prefill")}
    with both_at_work(live, some) as answers:
        hangs = serve.get_deployment_handle("decode", live.live.app).wedge_engine.remote().result(timeout_s=20)
        forgotten(live, "decode", num_left=1)
        # Its metrics can still be found, and say which part it is.
        assert live.look().each("shoal_component_healthy", component="engine")[hangs] == 0
        assert not all(answer.done() for answer in answers)
        serve.get_deployment_handle("prefill", live.live.app).wedge_loop.remote()
        forgotten(live, "prefill", num_left=1)
    live.await_whole()
    left = {entry.replica_id for entry in live.live.replica_entries("prefill")} & prefill
    live.replaced(hangs, *(prefill - left))
    assert len(left) == 1


@pytest.mark.long
def test_a_decode_process_that_stands_still_is_replaced_and_the_other_finishes_its_answers(
    live: TestCluster, some: dict[str, RealPrompt]
):
    """The whole of it: no thread of its own can tell."""
    before = live.look()
    with both_at_work(live, some):
        [one, _] = live.live.replica_entries("decode")
        os.kill(one.pid, signal.SIGSTOP)
        try:
            forgotten(live, "decode", num_left=1, within_s=GONE_WITHIN_S)
        finally:
            with suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGCONT)
    live.replaced(one.replica_id)
    after = live.look()
    assert rise(before, after, "shoal_retries_total", reason="peer_gone") >= 1
    assert rise(before, after, "shoal_requests_total", status="200") == len(some)


@pytest.mark.long
def test_a_decode_process_that_is_told_to_end_does_and_all_is_answered(live: TestCluster, some: dict[str, RealPrompt]):
    """SIGTERM to the process itself: Ray begins no more in it, and lets it finish; if that takes longer than Serve
    waits for its health, the other one does the rest."""
    before = live.look()
    with both_at_work(live, some, num_tokens=48):
        [one, _] = live.live.replica_entries("decode")
        os.kill(one.pid, signal.SIGTERM)
        forgotten(live, "decode", num_left=1, within_s=GONE_WITHIN_S)
    live.replaced(one.replica_id)
    assert rise(before, live.look(), "shoal_requests_total", status="200") == len(some)


@pytest.mark.long
def test_half_of_64_clients_leave_whenever_they_like(live: TestCluster, known: Mapping[str, RealPrompt]):
    """By HTTP and by gRPC. The others get what they would have got alone; afterwards everything is back."""
    chance = random.Random(5)
    # The longest would only take longer: in float32 they are most of the work.
    prompts = sorted(known.values(), key=lambda prompt: len(prompt.token_ids))[:12]
    answers = [Answer(prompts[index % len(prompts)], num_tokens=12) for index in range(64)]
    chance.shuffle(answers)
    stayers, leavers = answers[:32], answers[32:]
    num_left = 0

    async def leave(read: Callable[..., Awaitable[Answer]], answer: Answer, moment: float) -> None:
        """Hang up after some time, after some chunks, or at the very end, by chance."""
        nonlocal num_left
        try:
            async with asyncio.timeout(moment * 30 if chance.random() < 0.5 else None):
                await read(answer, num_chunks=1 + int(moment * answer.num_tokens))
        except TimeoutError:
            pass
        num_left += not answer.is_done

    async def run() -> None:
        target = f"127.0.0.1:{live.config.gateway.grpc_port}"
        async with connected(live) as http, AsyncClient(target, timeout_s=280) as grpc:
            doors = itertools.cycle((partial(ask, http), partial(ask_grpc, grpc)))
            leaving = [asyncio.create_task(leave(next(doors), answer, chance.random())) for answer in leavers]
            for answer in await asyncio.gather(*(next(doors)(answer) for answer in stayers)):
                answer.assert_right()
            await asyncio.gather(*leaving)

    before = live.look()
    asyncio.run(run())
    after = live.look()
    assert num_left >= 16, "hardly anybody left"
    live.assert_nothing_held()
    # One that leaves at once may never have been heard of.
    assert 32 + num_left / 2 <= rise(before, live.look(), "shoal_requests_total") <= 64
    assert rise(before, after, "shoal_kv_fallback_total", rung="unavailable") == 0
    assert live.look().metric("shoal_kv_blocks", state="free") == live.look().metric("shoal_kv_blocks")


def test_a_gateway_that_is_killed_is_replaced_at_its_ports(live: TestCluster, known: Mapping[str, RealPrompt]):
    [killed] = live.live.replica_entries("gateway")
    live.kill(killed.replica_id)
    while killed in live.live.replica_entries("gateway"):
        threading.Event().wait(MOMENT_S)
    live.await_whole()
    assert_answers_at_both_doors(live, known)


def test_a_gateway_that_is_stopped_finishes_its_answers_and_leaves_its_ports_to_the_next(
    live: TestCluster, known: Mapping[str, RealPrompt]
):
    prompt = min(known.values(), key=lambda one: len(one.token_ids))

    async def run() -> None:
        async with connected(live) as client:
            answer = Answer(prompt, num_tokens=64)
            asked = asyncio.create_task(ask(client, answer))
            await until(live, asked, lambda _look: bool(answer.chunks))
            await asyncio.to_thread(live.scale, "gateway", 0)
            (await asked).assert_right()

    asyncio.run(run())
    live.scale("gateway", 1)
    assert_answers_at_both_doors(live, known)


def assert_answers_at_both_doors(live: TestCluster, known: Mapping[str, RealPrompt]) -> None:
    prompt = min(known.values(), key=lambda one: len(one.token_ids))
    target = f"127.0.0.1:{live.config.gateway.grpc_port}"

    async def run() -> None:
        async with connected(live) as http, AsyncClient(target, timeout_s=60) as grpc:
            (await ask(http, Answer(prompt, num_tokens=4))).assert_right()
            (await ask_grpc(grpc, Answer(prompt, num_tokens=4))).assert_right()

    asyncio.run(run())


# The last, since each leaves its pool with one replica.
@pytest.mark.parametrize("role", [pytest.param("prefill", marks=pytest.mark.long), "decode"])
def test_a_replica_that_is_shut_down_finishes_what_it_has(
    live: TestCluster, known: Mapping[str, RealPrompt], role: str
):
    """It gets no more work at once. Clients see nothing of it, however long their answers are, and none is asked for
    again."""
    from shoal.cluster import directory  # not before the cluster has set Ray's environment

    by_length = sorted(known.values(), key=lambda prompt: len(prompt.token_ids))
    some = by_length[8:16] if role == "prefill" else by_length[4:12]  # decode has its answers to finish, prefill these

    def both_work(look: Look) -> bool:
        return len(holders(look, "shoal_kv_blocks", role=role, state="used")) == 2

    async def run() -> None:
        async with connected(live) as client:
            asked: list[asyncio.Task[Answer]] = []
            for prompt in some:
                asked.append(asyncio.create_task(ask(client, Answer(prompt, num_tokens=64))))
                # Serve would send a burst to whichever replica it last heard of; between looks it hears of both.
                await asyncio.to_thread(live.look)
            await until(live, asked[-1], both_work)
            # Whatever is asked meanwhile is answered, too.
            scaling = asyncio.create_task(asyncio.to_thread(live.scale, role, 1))
            await asyncio.to_thread(forgotten, live, role, 1)
            assert len(directory.registered(live.live.app, role)) == 2, "it had nothing to finish"
            while not scaling.done():
                asked.append(asyncio.create_task(ask(client, Answer(some[0], num_tokens=2))))
                await asyncio.wait((scaling, asked[-1]), return_when=asyncio.FIRST_COMPLETED)
            await scaling
            for answer in await asyncio.gather(*asked):
                answer.assert_right()

    before = live.look()
    asyncio.run(run())
    after = live.look()
    for name in ("shoal_retries_total", "shoal_kv_fallback_total"):
        assert rise(before, after, name) == 0
