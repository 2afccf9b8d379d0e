"""Sessions of a prefill process: opened once, shared fairly, opened again after a death."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace

import pytest
from fake_clock import FakeClock, settle
from kv_prompts import PLAN, lease_id, prompt
from transfer_helpers import Rig, rig

from shoal.errors import PeerGone
from shoal.handoff.channels.grpc import dial
from shoal.handoff.lease import LeaseState
from shoal.handoff.session import Identity
from shoal.handoff.session_pool import SessionPool
from shoal.wire.handoff_messages import Chunk, Envelope, Grant, Granted
from shoal.wire.messages import RequestContext
from shoal.wire.options import HANDOFF_CONNECT_TIMEOUT_S

KEY = bytes(range(16))


@pytest.mark.parametrize("kind", ["memory", "grpc"])
async def test_all_who_ask_at_once_share_one_session(kind: str) -> None:
    async with rig(kind) as both:
        sessions = await asyncio.gather(*(both.pool.get(both.address) for _ in range(5)))
        assert len(set(sessions)) == len(both.channels) == 1


async def test_who_asked_first_may_leave_without_harm_to_the_others() -> None:
    async with rig() as both:
        first, second = (asyncio.ensure_future(both.pool.get("memory")) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert not (await second).is_over


async def test_decode_listens_on_its_address_alone() -> None:
    async with rig("grpc") as both:
        port = int(both.address.removeprefix("127.0.0.1:"))
        with socket.create_connection(("127.0.0.1", port)), pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port))


async def test_who_takes_a_connection_and_says_nothing_is_given_up() -> None:
    """Before gRPC itself gives the connection up, when it would tell nobody of a call that was cancelled meanwhile."""

    async def say_nothing(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)

    connections: list[asyncio.StreamWriter] = []
    pool = SessionPool(dial, Identity(1, (PLAN,)), ttl_s=HANDOFF_CONNECT_TIMEOUT_S / 10, max_frame_bytes=1024)
    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    try:
        port = server.sockets[0].getsockname()[1]
        for _ in range(2):
            async with asyncio.timeout(10):
                with pytest.raises(PeerGone, match="nothing was heard"):
                    await pool.get(f"127.0.0.1:{port}")
    finally:
        server.close()
        for connection in connections:
            connection.close()


async def test_nobody_there_is_peer_gone_and_is_tried_again() -> None:
    dialled = []

    async def connect(address: str) -> object:
        dialled.append(address)
        return await dial(address)

    pool = SessionPool(connect, Identity(1, (PLAN,)), ttl_s=5.0, max_frame_bytes=1024)  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(PeerGone, match=r"127\.0\.0\.1:1\b"):
            await asyncio.wait_for(pool.get("127.0.0.1:1"), 5)
    assert len(dialled) == 2
    await pool.close()


async def test_whom_it_greets_before_the_first_prompt_it_needs_no_more_greeting() -> None:
    async with rig("grpc") as both:
        nobody = "127.0.0.1:1"
        failed = await both.pool.greet([both.address, nobody], within_s=10.0)
        assert {address: error.code for address, error in failed.items()} == {nobody: "peer_gone"}
        assert len(both.channels) == 2
        await both.hand_off(prompt())
        assert len(both.channels) == 2


async def test_a_long_prompt_does_not_hold_up_a_short_one() -> None:
    order: list[bytes] = []

    def note(envelope: Envelope) -> tuple[Envelope]:
        if isinstance(envelope.frame, Chunk):
            order.append(envelope.frame.lease_id)
        return (envelope,)

    async with rig(prefill_sends=note, credit_bytes=1 << 20) as both:
        long, short = prompt(401, seed=1), prompt(65, seed=2)
        session = await both.pool.get("memory")
        ids = lease_id(), lease_id()

        async def ship(new_id: bytes, wanted: object, num_tokens: int) -> None:
            async with session.claim(new_id) as claim:
                payload = wanted.kv.tobytes()  # type: ignore[attr-defined]
                await claim.send(0, num_tokens, 0, 4, memoryview(payload))
                await claim.seal(boundary_token_id=claim.token_ids[-1], queue_s=0, prefill_s=0)

        async with both.open(ids[0], long) as first, both.open(ids[1], short) as second:
            await asyncio.gather(ship(ids[0], long, 400), ship(ids[1], short, 64))
            await asyncio.gather(first.arrived(), second.arrived())
        both.assert_arrived(long)
        both.assert_arrived(short)
    num_short = order.count(ids[1])
    assert order.count(ids[0]) >= 5 * num_short >= 40
    last_short = max(place for place, new_id in enumerate(order) if new_id == ids[1])
    assert last_short <= 2 * num_short + 2  # each had its turn after one of the other's


async def test_a_session_that_is_over_leaves_no_task_and_no_timer() -> None:
    clock = FakeClock()
    before = asyncio.all_tasks()
    async with rig(clock=clock) as both:
        await both.hand_off(prompt())
        await both.channels[0].close()
        await settle()
        assert not {task for task in asyncio.all_tasks() - before if "Session" in repr(task.get_coro())}
        assert not [timer for _, _, timer in clock._due if timer.callback and "Session" in repr(timer.callback)]


def knowing(both: Rig, key: bytes = KEY) -> list[Grant]:
    """What prefill is granted from now on, which has that key."""
    heard: list[Grant] = []
    both.pool.granted = heard.append
    both.pool._identity = replace(both.pool._identity, key=key)
    return heard


@pytest.mark.parametrize("kind", ["memory", "grpc"])
async def test_decode_grants_a_prompt_to_the_replica_that_has_the_key_and_to_no_other(kind: str) -> None:
    async with rig(kind) as both:
        heard: asyncio.Queue[Grant] = asyncio.Queue()
        knowing(both)
        both.pool.granted = heard.put_nowait
        assert await both.server.grant(grant("before there is a session"), KEY, 60) is None
        await both.pool.get(both.address)
        assert await both.server.grant(grant("to somebody else"), b"another key here", 60) is None
        assert await both.server.grant(wanted := grant("to this one"), KEY, 0.01) is False
        found = await asyncio.wait_for(heard.get(), 10)
        assert found == replace(wanted, handoff_address=both.address, excluded=frozenset(), prefix_keys=())
        await both.hand_off(prompt())
        assert heard.empty()


async def test_who_has_no_key_is_granted_nothing() -> None:
    async with rig("memory") as both:
        heard = knowing(both, b"")
        await both.pool.get("memory")
        assert await both.server.grant(grant("to nobody"), b"", 60) is None
        await settle()
        assert not heard


async def test_who_is_leaving_is_granted_nothing_more_and_hears_no_more() -> None:
    async with rig("memory") as both:
        heard = knowing(both)
        session = await both.pool.get("memory")
        leaves = asyncio.ensure_future(session.drain())
        assert await both.server.grant(grant("too early to know"), KEY, 0.01) is False
        await leaves
        await settle()
        assert [one.context.request_id for one in heard] == ["too early to know"]
        assert await both.server.grant(grant("too late"), KEY, 60) is None
        await settle()
        assert len(heard) == 1
        both.pool._is_draining = True
        session._obey(Granted.of(grant("on its way")))
        assert len(heard) == 1


async def test_who_grants_waits_for_the_claim_s_answer_or_as_long_as_it_may() -> None:
    async with rig("memory") as both:
        knowing(both)
        session = await both.pool.get("memory")
        for end in ("claim", "time"):
            one = grant(end)
            async with both.open(one.lease_id, prompt()) as lease:
                granting = asyncio.ensure_future(both.server.grant(one, KEY, 0.01 if end == "time" else 60))
                if end == "claim":
                    await settle()
                    assert not granting.done()
                    async with session.claim(one.lease_id):
                        assert await asyncio.wait_for(granting, 10) is True
                else:
                    assert await asyncio.wait_for(granting, 10) is False
                    assert lease.lease.state is LeaseState.RESERVED


def grant(request_id: str) -> Grant:
    context = RequestContext(request_id, 7.5, tenant="one", attempt=2)
    return Grant(lease_id(), "elsewhere", PLAN, 9, 4, 5.0, 30.0, context, frozenset({"x"}), (b"key",))
