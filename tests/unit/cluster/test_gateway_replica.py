"""From the gateway to the decode replica that it chose, and back."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from token_streams import Joined, generate_request, joined, output

from shoal.api.backend import Route
from shoal.cluster import directory
from shoal.cluster.balancer import Balancer
from shoal.cluster.directory import LivingPool
from shoal.cluster.gateway_replica import PoolBackend
from shoal.config import ShoalConfig
from shoal.decode.affinity import KEY_TOKENS
from shoal.errors import DeadlineExceeded, Overloaded, PeerGone, Unavailable
from shoal.wire.messages import GenerateRequest, RequestContext, TokenOutput
from shoal.wire.token_server import Outlet

PROMPT = tuple(range(20_000, 20_000 + KEY_TOKENS))
REQUEST = replace(generate_request(*PROMPT), context=RequestContext("id", 60.0, tenant="t"))


class Living:
    """The directory's word: these decode replicas live."""

    def __init__(self, **replicas: Joined) -> None:
        self._replicas = replicas

    async def ids(self) -> frozenset[str]:
        return frozenset(self._replicas)

    def key_of(self, replica_id: str) -> bytes:
        return self._replicas[replica_id].decode.place.server_id

    def address_of(self, replica_id: str) -> str:
        return self._replicas[replica_id].decode.address


def backend(both: Joined, living: Any = None, balancer: Balancer | None = None, **decode: Any) -> PoolBackend:
    return PoolBackend(ShoalConfig(decode=decode), living or Living(a=both), both.client, balancer or Balancer())


async def outputs_of(pool: PoolBackend, request: GenerateRequest = REQUEST, route: Route | None = None) -> list[Any]:
    async with aclosing(pool.generate(request, route or Route())) as outputs:
        return [one async for one in outputs]


async def answer_with_one(_request: GenerateRequest, outlet: Outlet) -> None:
    outlet.send(output(1))


async def test_the_request_goes_to_the_replica_and_its_outputs_come_back():
    async with joined() as both:
        balancer, route = Balancer(), Route()
        asking = asyncio.create_task(outputs_of(backend(both, balancer=balancer), route=route))
        running = await both.decode.came.get()
        assert balancer.num_open("a") == 1
        running.outlet.send(output(1))
        running.end.set_result(None)
        assert await asking == [output(1)]
        assert balancer.num_open("a") == 0 and route.replica_id == "a"
        arrived = running.request
    assert arrived == replace(REQUEST, context=replace(REQUEST.context, timeout_s=arrived.context.timeout_s))
    assert 0 < arrived.context.timeout_s < REQUEST.context.timeout_s  # what has passed meanwhile is gone


@pytest.mark.parametrize(("reuse", "remembers"), [("none", False), ("exact", True), ("any", True)])
async def test_prompts_that_begin_alike_go_to_one_replica_where_decode_remembers(reuse: str, remembers: bool):
    async with joined(answer=answer_with_one) as both, joined(answer=answer_with_one) as other:
        pool = backend(both, Living(a=both, b=other), reuse=reuse)
        routes = [Route() for _ in range(24)]
        for route in routes:
            await outputs_of(pool, route=route)
    assert (len({route.replica_id for route in routes}) == 1) is remembers


async def test_it_is_told_where_a_request_went_that_failed():
    async def fail(_request: GenerateRequest, _outlet: Outlet) -> None:
        raise PeerGone("died")

    async with joined(answer=fail) as both, joined() as other:
        route, balancer = Route(frozenset("b")), Balancer()
        with pytest.raises(PeerGone):
            await outputs_of(backend(both, Living(a=both, b=other), balancer), route=route)
    assert route.replica_id == "a" and not balancer.num_open("a")


async def test_a_replica_that_drains_gets_no_more():
    async with joined() as both, joined(answer=answer_with_one) as other:
        stream, _ = both.open()
        running = await both.decode.came.get()
        draining = asyncio.create_task(both.decode.tokens.drain(60))
        async with asyncio.timeout(10):
            while not both.client.draining:
                await asyncio.sleep(0)
        pool, route = backend(both, Living(a=both, b=other)), Route()
        for _ in range(8):
            assert await outputs_of(pool, route=route) == [output(1)]
            assert route.replica_id == "b"
        running.end.set_result(None)
        await draining
        assert [one async for one in stream] == []


async def test_where_ray_s_head_has_never_said_who_serves_it_is_refused_for_now(monkeypatch: pytest.MonkeyPatch):
    def fails(*_: str) -> Any:
        raise ConnectionError("no head")

    monkeypatch.setattr(directory, "registered", fails)
    async with joined() as both:
        with pytest.raises(Unavailable, match="no decode replica") as refused:
            await outputs_of(backend(both, LivingPool("shoal", "decode")))
    assert refused.value.retry_after_s == 1.0


async def test_what_decode_says_against_a_request_is_what_it_ends_with():
    async def refuse(_request: GenerateRequest, _outlet: Outlet) -> None:
        raise Overloaded("full", retry_after_s=3.0)

    async with joined(answer=refuse) as both:
        with pytest.raises(Overloaded, match="full") as refused:
            await outputs_of(backend(both))
    assert refused.value.retry_after_s == 3.0


async def test_who_leaves_ends_the_request_at_decode():
    async with joined() as both:
        balancer = Balancer()
        asking = asyncio.create_task(outputs_of(backend(both, balancer=balancer)))
        running = await both.decode.came.get()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        async with asyncio.timeout(5):
            while running.is_open:
                await asyncio.sleep(0)
        assert not balancer.num_open("a")


async def test_a_request_whose_time_has_passed_is_not_brought_anywhere():
    async with joined() as both:
        late = replace(REQUEST, context=replace(REQUEST.context, timeout_s=0.0))
        with pytest.raises(DeadlineExceeded):
            await outputs_of(backend(both), late)
        assert both.decode.came.empty()


async def test_a_request_that_decode_says_nothing_of_ends_at_its_deadline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shoal.cluster.gateway_replica._GRACE_S", 0.0)
    outputs: list[TokenOutput] = []
    async with joined() as both:
        soon = replace(REQUEST, context=replace(REQUEST.context, timeout_s=0.05))
        with pytest.raises(DeadlineExceeded):
            outputs += await outputs_of(backend(both), soon)
