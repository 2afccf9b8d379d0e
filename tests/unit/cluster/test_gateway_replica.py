"""From the gateway to a decode replica and back: what goes by Serve's handle, and what by gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from ray import cloudpickle
from ray.exceptions import RayTaskError
from token_streams import Joined, generate_request, joined, output

from shoal.api.backend import Route
from shoal.cluster import directory, routes
from shoal.cluster.directory import LivingPool
from shoal.cluster.gateway_replica import PoolBackend
from shoal.config import ShoalConfig
from shoal.decode.affinity import KEY_TOKENS, prefix_keys
from shoal.errors import DeadlineExceeded, Overloaded, PeerGone, RequestTooLarge, ShoalError, Unavailable
from shoal.wire.messages import GenerateRequest, RequestContext, Resumption, SentChoice, Ticket
from shoal.wire.token_server import Outlet, Place
from shoal.wire.values import MAX_ID

PROMPT = tuple(range(20_000, 20_000 + KEY_TOKENS))
REQUEST = replace(generate_request(*PROMPT), context=RequestContext("id", 60.0, tenant="t"))


class Serve:
    """Its handle to the one decode replica of ``both``, which does with a request what ``work`` says."""

    def __init__(self, both: Joined, work: Callable[[Outlet], Any]) -> None:
        self.tickets: list[Ticket] = []
        self.is_open = False
        self._both = both
        self._work = work

    def options(self, *, stream: bool) -> Serve:
        assert stream
        return self

    @property
    def generate(self) -> Serve:
        return self

    def remote(self, ticket: Ticket) -> _Call:
        self.tickets.append(ticket)
        return _Call(partial(self._run, cloudpickle.loads(cloudpickle.dumps(ticket))))

    async def _run(self, ticket: Ticket, place: asyncio.Future[Place]) -> None:
        self.is_open = True
        try:
            with self._both.decode.tokens.open(ticket) as outlet:
                place.set_result(self._both.decode.place)
                await self._work(outlet)
        except ShoalError as error:
            raise RayTaskError("generate", "traceback", error) from None
        finally:
            self.is_open = False


class _Call:
    """It runs in the replica, whether anybody iterates or not."""

    def __init__(self, run: Callable[[asyncio.Future[Place]], Coroutine[Any, Any, None]]) -> None:
        self._place: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        self._running = asyncio.create_task(run(self._place))

    async def __aiter__(self) -> AsyncIterator[Place]:
        yield await self._place
        await asyncio.shield(self._running)

    def cancel(self) -> None:
        self._running.cancel()


class Living:
    def __init__(self, ids: str = "a", unfit: str = "") -> None:
        self._ids, self.unfit = frozenset(ids), frozenset(unfit)

    async def ids(self) -> frozenset[str]:
        return self._ids


def backend(both: Joined, serve: Serve, living: Living | LivingPool | None = None, **decode: Any) -> PoolBackend:
    return PoolBackend(ShoalConfig(decode=decode), serve, living or Living(), both.client)  # type: ignore[arg-type]


async def outputs_of(pool: PoolBackend, request: GenerateRequest = REQUEST, route: Route | None = None) -> list[Any]:
    async with aclosing(pool.generate(request, route or Route())) as outputs:
        return [one async for one in outputs]


async def test_the_request_goes_to_the_place_and_its_outputs_come_back():
    came: list[GenerateRequest] = []

    async def work(outlet: Outlet) -> None:
        came.append(await outlet.request())
        outlet.send(output(1))
        await outlet.end()

    async with joined() as both:
        serve = Serve(both, work)
        assert await outputs_of(backend(both, serve)) == [output(1)]
        assert not serve.is_open
    [arrived] = came
    assert arrived == replace(REQUEST, context=replace(REQUEST.context, timeout_s=arrived.context.timeout_s))
    assert 0 < arrived.context.timeout_s < REQUEST.context.timeout_s  # what has passed meanwhile is gone


@pytest.mark.parametrize(("reuse", "remembers"), [("none", False), ("exact", True), ("any", True)])
async def test_routers_get_keys_only_where_decode_remembers(reuse: str, remembers: bool):
    async def work(outlet: Outlet) -> None:
        await outlet.request()
        await outlet.end()

    async with joined() as both:
        serve = Serve(both, work)
        await outputs_of(backend(both, serve, reuse=reuse))
    [ticket] = serve.tickets
    assert ticket.prefix_keys == (prefix_keys("t", PROMPT) if remembers else ())


async def test_it_is_told_where_a_request_went_that_failed():
    async def work(_outlet: Outlet) -> None:
        routes.note(serve.tickets[-1], "a")  # as Serve's router does
        raise PeerGone("died")

    async with joined() as both:
        serve = Serve(both, work)
        route = Route(frozenset("b"))
        with pytest.raises(PeerGone):
            await outputs_of(backend(both, serve), route=route)
    [ticket] = serve.tickets
    assert ticket.excluded == {"b"} and route.replica_id == "a"
    assert not routes.num_chosen()["a"]  # though its error, or we, may hold the ticket yet


@pytest.mark.parametrize(
    ("living", "unfit", "failed", "excluded"),
    [("ab", "", "", ""), ("ab", "c", "", "c"), ("ab", "c", "b", "bc"), ("ab", "c", "abc", "c"), ("a", "c", "a", "c")],
)
async def test_a_replica_that_hangs_is_asked_by_nobody_whoever_else_has_failed(
    living: str, unfit: str, failed: str, excluded: str
):
    """Serve still offers it, and its queue is the shortest."""

    async def work(outlet: Outlet) -> None:
        await outlet.request()
        await outlet.end()

    async with joined() as both:
        serve = Serve(both, work)
        pool = backend(both, serve, Living(living, unfit))
        await outputs_of(pool, route=Route(frozenset(failed)))
    [ticket] = serve.tickets
    assert ticket.excluded == frozenset(excluded)


async def test_where_ray_s_head_has_never_said_who_serves_it_is_refused_for_now(monkeypatch: pytest.MonkeyPatch):
    def fails(*_: str) -> Any:
        raise ConnectionError("no head")

    monkeypatch.setattr(directory, "registered", fails)
    async with joined() as both:
        serve = Serve(both, lambda outlet: outlet.request())
        with pytest.raises(Unavailable, match="no decode replica") as refused:
            await outputs_of(backend(both, serve, LivingPool("shoal", "decode")))
    assert refused.value.retry_after_s == 1.0 and not serve.tickets


async def test_a_replica_that_gets_no_request_says_so_and_the_gateway_may_ask_another(monkeypatch: pytest.MonkeyPatch):
    async def never(*_: Any) -> None:
        pass

    async with joined() as both:
        serve = Serve(both, lambda outlet: outlet.request(timeout_s=0.01))
        monkeypatch.setattr(both.client, "submit", never)
        with pytest.raises(PeerGone, match="bring the request"):
            await outputs_of(backend(both, serve))


async def test_what_decode_says_against_a_request_is_what_it_ends_with():
    async def work(outlet: Outlet) -> None:
        await outlet.request()
        raise Overloaded("full", retry_after_s=3.0)

    async with joined() as both:
        with pytest.raises(Overloaded, match="full") as refused:
            await outputs_of(backend(both, Serve(both, work)))
    assert refused.value.retry_after_s == 3.0


async def test_a_request_that_no_message_holds_is_refused():
    async with joined() as both:
        serve = Serve(both, lambda outlet: outlet.request())
        with pytest.raises(RequestTooLarge):
            await outputs_of(backend(both, serve), replace(REQUEST, prompt_token_ids=(MAX_ID,) * (1 << 19)))


async def test_an_answer_that_no_message_holds_is_not_resumed():
    """What the client asked for was no larger than allowed, and may be asked for again."""
    async with joined() as both:
        serve = Serve(both, lambda outlet: outlet.request())
        resumption = Resumption("plan", (SentChoice((MAX_ID,) * (1 << 19)),))
        with pytest.raises(Unavailable, match="too many tokens") as refused:
            await outputs_of(backend(both, serve), replace(REQUEST, resumption=resumption))
    assert refused.value.code == "unavailable" and refused.value.retry_after_s == 1.0


async def test_who_leaves_before_the_request_is_there_ends_the_call():
    began = asyncio.Event()

    async def work(_outlet: Outlet) -> None:
        began.set()
        await asyncio.Event().wait()

    async with joined() as both:
        serve = Serve(both, work)
        asking = asyncio.create_task(outputs_of(backend(both, serve)))
        await began.wait()
        assert serve.is_open
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        async with asyncio.timeout(5):
            while serve.is_open:
                await asyncio.sleep(0)


async def test_a_request_whose_time_has_passed_when_its_place_comes_is_not_brought_there():
    async def work(outlet: Outlet) -> None:
        await outlet.request()
        raise Overloaded("it was brought")

    async with joined() as both:
        late = replace(REQUEST, context=replace(REQUEST.context, timeout_s=0.0))
        with pytest.raises(DeadlineExceeded):
            await outputs_of(backend(both, Serve(both, work)), late)
