"""Which replica a request goes to."""

from __future__ import annotations

import gc
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle
from ray.serve._private.common import RequestMetadata
from ray.serve.request_router import PendingRequest

from shoal.cluster import routes
from shoal.cluster.router import MAX_LONGER, GrantRouter
from shoal.decode.affinity import KEY_TOKENS, Affinity
from shoal.wire.handoff_messages import Grant
from shoal.wire.messages import RequestContext

IDS = {name: SimpleNamespace(unique_id=name) for name in "abcd"}
REPLICAS = [SimpleNamespace(replica_id=replica_id) for replica_id in IDS.values()]
PROMPT = tuple(range(2 * KEY_TOKENS))


def make(kind: type, queues: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Serve makes a router, with what only Serve has; choosing needs the lengths of queues, where those are known."""
    monkeypatch.setattr(routes, "affinity", Affinity())
    monkeypatch.setattr(routes, "_blamed_s", {})
    monkeypatch.setattr(routes, "_pickers", [])
    cache = SimpleNamespace(get=lambda replica_id: queues.get(replica_id.unique_id))
    monkeypatch.setattr(kind, "replica_queue_len_cache", cache)
    return object.__new__(kind)


@pytest.fixture
def queues() -> dict[str, int]:
    return {}


@pytest.fixture
def router(queues: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> Any:
    return make(GrantRouter, queues, monkeypatch)


def grant(*excluded: str, keys: tuple[bytes, ...] = ()) -> Grant:
    context = RequestContext("one", timeout_s=1)
    return Grant(b"1" * 16, "127.0.0.1:1", "plan", 3, 0, 5.0, 30.0, context, frozenset(excluded), keys)


def distinct(call: Grant, number: int) -> Grant:
    """As those that are made at once are: no two have the same name."""
    return replace(call, lease_id=number.to_bytes(16, "big"))


async def first_rank(router: Any, request: Any, replicas: list[Any] = REPLICAS) -> list[str]:
    ranks = await router.choose_replicas(replicas, request)
    return sorted(replica.replica_id.unique_id for replica in ranks[0])


def pending(*args: Any) -> Any:
    return SimpleNamespace(args=list(args), routing_context=SimpleNamespace(should_backoff=False))


async def chosen(router: Any, replicas: list[Any], request: Any) -> set[str]:
    """Every replica that may come out, over many choices; each choice is of at most two, one after the other."""
    found: set[str] = set()
    for _ in range(200):
        ranks = await router.choose_replicas(replicas, request)
        assert 1 <= len(ranks) <= 2
        for [replica] in ranks:
            found.add(replica.replica_id.unique_id)
    return found


@pytest.mark.parametrize(
    ("excluded", "left"), [("", "abcd"), ("b", "acd"), ("abd", "c"), ("abcd", "abcd"), ("xy", "abcd")]
)
async def test_a_grant_goes_to_none_that_it_excludes_if_there_is_another(router: Any, excluded: str, left: str):
    assert await chosen(router, REPLICAS, pending(grant(*excluded))) == set(left)


@pytest.mark.parametrize(("kind", "make_call"), [("router", grant)])
@pytest.mark.parametrize("known", ["abcd", "abc", ""])
async def test_calls_that_come_at_once_are_spread_also_to_a_replica_that_serve_has_forgotten(
    kind: str, make_call: Callable[[], Any], known: str, queues: dict[str, int], request: pytest.FixtureRequest
):
    router = request.getfixturevalue(kind)
    request.getfixturevalue("monkeypatch").setattr(routes, "time", SimpleNamespace(monotonic=lambda: 0.0))
    queues.update(dict.fromkeys(known, 0))
    before = routes.num_chosen().total()
    calls = [distinct(make_call(), number) for number in range(64)]
    sent = Counter([(await first_rank(router, pending(call)))[0] for call in calls])
    assert all(12 <= sent[name] <= 20 for name in "abcd"), sent  # by chance alone, two of three times it wouldn't be so
    assert routes.num_chosen().total() == before + 64
    for call in calls[:10]:
        routes.ended(call)  # also while somebody holds it yet
        routes.ended(call)
    del call, calls[10:60]
    gc.collect()
    assert routes.num_chosen().total() == before + 4
    routes.ended(distinct(make_call(), 99))  # it never began


@pytest.mark.parametrize(("kind", "make_call"), [("router", grant)])
async def test_replicas_that_share_cores_are_filled_one_after_the_other(
    kind: str, make_call: Callable[[], Any], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    router = request.getfixturevalue(kind)
    monkeypatch.setattr(routes, "time", SimpleNamespace(monotonic=lambda: 0.0))
    router.initialize_state(pack_up_to=4)
    calls = [distinct(make_call(), number) for number in range(20)]
    sent = [(await first_rank(router, pending(call)))[0] for call in calls]
    assert "".join(sent[:16]) == "aaaabbbbccccdddd"
    assert Counter(sent[16:]) == Counter("abcd"), "all are full: the least busy one"
    for call in calls[4:7]:
        routes.ended(call)
    del call
    last = distinct(make_call(), 20)  # held, or it would count nowhere
    assert await first_rank(router, pending(last)) == ["b"], "the only one with room"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(routes, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    return clock


async def test_packing_passes_over_who_is_silent_and_knows_another_to_try(
    router: Any, queues: dict[str, int], clock: SimpleNamespace
):
    router.initialize_state(pack_up_to=4)
    queues.update(b=2, c=3, d=9)
    stuck = distinct(grant(), 1)
    ranks = await router.choose_replicas(REPLICAS, pending(stuck))
    assert [one.replica_id.unique_id for [one] in ranks] == ["c", "b"]
    clock.now_s += 2 * routes.PATIENCE_S
    assert await first_rank(router, pending(distinct(grant(), 2))) == ["b"]
    routes.ended(stuck)


async def test_a_grant_may_take_as_long_as_it_does(router: Any, clock: SimpleNamespace):
    """Nothing is heard of it before its end."""
    router.initialize_state(pack_up_to=4)
    first = distinct(grant(), 1)
    assert await first_rank(router, pending(first)) == ["a"]
    router.on_request_routed(pending(first), IDS["a"], None)
    clock.now_s += 60.0
    assert await first_rank(router, pending(distinct(grant(), 2))) == ["a"]


async def test_told_nothing_by_the_deployment_a_router_spreads(router: Any):
    router.initialize_state()
    assert await chosen(router, REPLICAS, pending(grant())) == set("abcd")


@pytest.mark.parametrize(("length", "first"), [(7, "b"), (8, "a")])
async def test_a_packed_pool_sends_a_known_beginning_where_it_is_while_there_is_room(
    router: Any, queues: dict[str, int], length: int, first: str
):
    router.initialize_state(pack_up_to=8)
    router.on_request_routed(pending(distinct(grant(keys=(b"1",)), 1)), IDS["b"], None)
    queues.update(a=3, b=length, c=0)
    assert await first_rank(router, pending(distinct(grant(keys=(b"1",)), 2))) == [first]


async def test_one_that_does_not_take_a_call_in_time_comes_last_until_it_does(
    router: Any, monkeypatch: pytest.MonkeyPatch
):
    """It may hang: a call that tries it waits for a second, and others behind that call."""
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(routes, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    two = [replica for replica in REPLICAS if replica.replica_id.unique_id in "ab"]
    stuck, *busy = (distinct(grant(keys=keys), number) for number, keys in enumerate([(b"1",), *[()] * 4]))
    router.on_request_routed(pending(grant(keys=(b"1",))), IDS["a"], None)
    assert await first_rank(router, pending(stuck), two) == ["a"]  # where its beginning is known
    for call in busy:
        router.on_request_routed(pending(call), IDS["b"], None)

    async def firsts() -> set[str]:
        return {(await first_rank(router, pending(grant(keys=keys)), two))[0] for keys in ((), (b"1",)) for _ in "12"}

    assert await firsts() == {"a"}
    clock.now_s += 2 * routes.PATIENCE_S
    assert await firsts() == {"b"}  # though it's busy, and the other one knows the beginning
    router.on_request_routed(pending(stuck), IDS["a"], None)
    assert await firsts() == {"a"}
    given_up = distinct(grant(), 98)
    assert await first_rank(router, pending(given_up), two) == ["a"]
    clock.now_s += 2 * routes.PATIENCE_S
    assert routes.silent() == {"a"}
    routes.ended(given_up)
    assert routes.silent() == frozenset()
    await router.choose_replicas(two, pending(given_up))  # Serve hears later that nobody waits any more
    clock.now_s += 2 * routes.PATIENCE_S
    assert routes.silent() == frozenset()


async def test_the_less_busy_one_of_two_is_first_whoever_knows_of_its_calls(router: Any, queues: dict[str, int]):
    ours = [distinct(grant(), number) for number in range(5)]
    for call in ours:
        router.on_request_routed(pending(call), IDS["a"], None)
    queues.update({"a": 0, "b": 4})  # of the five, Serve doesn't know yet; of b's, some are another gateway's
    two = [replica for replica in REPLICAS if replica.replica_id.unique_id in "ab"]
    for _ in range(20):
        assert await first_rank(router, pending(grant()), two) == ["b"]


@pytest.fixture(params=["router"])
def picking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Callable[[], Grant]]:
    """A router when Serve has made it, and told it of replicas; and what makes it a call."""
    router = request.getfixturevalue(request.param)
    monkeypatch.setattr(type(router), "curr_replicas", dict(enumerate(REPLICAS)), raising=False)
    router.initialize_state()
    return router, grant


async def test_what_is_picked_before_serve_is_asked_is_what_serve_tries_first(picking: Any):
    router, make_call = picking
    calls = [distinct(make_call(), number) for number in range(20)]
    for number, call in enumerate(calls):
        picked = routes.pick(call)
        assert sum(routes.num_chosen().values()) == number + 1  # it counts from now on
        assert await first_rank(router, pending(call)) == [picked]


async def test_where_what_was_picked_refuses_a_call_another_is_as_good(picking: Any):
    router, make_call = picking
    call = make_call()
    routes.pick(call)
    await first_rank(router, pending(call))
    assert len({(await first_rank(router, pending(call)))[0] for _ in range(200)}) == len(REPLICAS)


async def test_what_was_picked_and_has_gone_since_is_passed_over(picking: Any):
    router, make_call = picking
    call = make_call()
    gone = routes.pick(call)
    left = [replica for replica in REPLICAS if replica.replica_id.unique_id != gone]
    assert gone not in await first_rank(router, pending(call), left)


async def test_what_was_picked_and_is_silent_since_is_passed_over(picking: Any, clock: SimpleNamespace):
    router, make_call = picking
    for number in range(20):
        call = distinct(make_call(), number)
        silent = routes.pick(call)
        clock.now_s += 10 * routes.PATIENCE_S  # and nobody took it
        assert [silent] != await first_rank(router, pending(call))
        routes.ended(call)


async def test_before_there_is_a_router_or_a_replica_nothing_is_picked(picking: Any, monkeypatch: pytest.MonkeyPatch):
    router, make_call = picking
    monkeypatch.setattr(type(router), "curr_replicas", {})
    assert routes.pick(make_call()) is None
    monkeypatch.setattr(routes, "_pickers", [])
    assert routes.pick(make_call()) is None


async def test_other_calls_go_anywhere(router: Any):
    assert await chosen(router, REPLICAS, pending()) == set("abcd")
    assert await chosen(router, REPLICAS, None) == set("abcd")


async def test_without_replicas_there_is_nothing_to_choose(router: Any):
    assert await router.choose_replicas([], pending(grant())) == []


@pytest.mark.parametrize(("kind", "make_call"), [("router", grant)])
def test_it_is_known_where_a_call_went_for_as_long_as_there_is_a_call(
    kind: str, make_call: Callable[[], Grant], request: pytest.FixtureRequest
):
    one = make_call()
    before = routes.num_noted()
    assert routes.replica_of(one) is None
    request.getfixturevalue(kind).on_request_routed(pending(one), SimpleNamespace(unique_id="c"), None)
    assert routes.replica_of(one) == "c"
    del one
    gc.collect()
    assert routes.num_noted() == before


async def test_a_grant_goes_where_its_beginning_went(router: Any):
    one = grant(keys=(b"1", b"12"))
    router.on_request_routed(pending(one), IDS["c"], None)
    assert await first_rank(router, pending(grant(keys=(b"1", b"13")))) == ["c"]
    assert await chosen(router, REPLICAS, pending(grant(keys=(b"2",)))) == set("abcd")
    assert "c" not in await first_rank(router, pending(grant("c", keys=(b"1",))))  # it has failed this prompt


async def test_if_the_known_one_does_not_answer_there_are_others(router: Any):
    router.on_request_routed(pending(grant(keys=(b"1",))), IDS["c"], None)
    ranks = await router.choose_replicas(REPLICAS, pending(grant(keys=(b"1",))))
    names = [replica.replica_id.unique_id for [replica] in ranks]
    assert names[0] == "c" and len(set(names)) == len(names) >= 2


@pytest.mark.parametrize(
    ("lengths", "is_known_one"),
    [
        ({}, True),
        ({"c": MAX_LONGER, "a": 0}, True),
        ({"c": MAX_LONGER + 1, "a": 0}, False),
        ({"c": 50, "a": 50, "b": 50, "d": 46}, True),
        ({"c": 50, "a": 49}, False),  # of the others nothing is known: they are asked how long theirs are
        ({"a": 9}, True),  # its own isn't known
        ({"c": 9}, False),  # no other's is, and nothing was sent there from here
    ],
)
async def test_a_busy_one_is_passed_over(
    router: Any, queues: dict[str, int], lengths: dict[str, int], is_known_one: bool
):
    router.on_request_routed(pending(grant(keys=(b"1",))), IDS["c"], None)
    queues.update(lengths)
    assert (await first_rank(router, pending(grant(keys=(b"1",)))) == ["c"]) is is_known_one


def test_what_routers_go_by_stays_in_their_process():
    call = grant("a", keys=(b"key",))
    sent = cloudpickle.dumps(call)
    assert not any(key in sent for key in call.prefix_keys)
    assert cloudpickle.loads(sent) == replace(call, prefix_keys=())


@pytest.mark.parametrize("kind", ["router"])
async def test_calls_of_one_request_share_its_id_and_each_finds_its_replica(kind: str, request: pytest.FixtureRequest):
    """Serve's own code, with Serve's own requests: a call that it can't find, it would look for without end."""
    router = request.getfixturevalue(kind)
    metadata = [RequestMetadata(request_id="one", internal_request_id="shared") for _ in range(3)]
    calls = [PendingRequest(args=[], kwargs={}, metadata=own) for own in metadata]
    router._pending_requests_to_fulfill = deque(calls)
    router._pending_requests_by_id = {}
    router._routing_task_by_pending_request_future = {}
    router.queue_wait_time_ms_histogram = SimpleNamespace(observe=lambda _waited: None)
    for call in calls:
        router._add_pending_request_to_indices(call)
    for call, replica in zip(reversed(calls), REPLICAS, strict=False):
        router._fulfill_next_pending_request(replica, call.metadata)
        assert call.future.done() and call.future.result() is replica
    router._fulfill_next_pending_request(REPLICAS[0], metadata[0])  # once more is a no-op


async def test_where_no_replica_will_do_the_next_try_waits(router: Any):
    call = pending(grant())
    await router.choose_replicas(REPLICAS, call)
    assert call.routing_context.should_backoff


async def test_while_one_lives_no_two_silent_ones_are_drawn(router: Any, clock: SimpleNamespace):
    stuck = [distinct(grant(), number) for number in range(3)]
    for call, name in zip(stuck, "abc", strict=True):
        routes.choose(call, name)
    clock.now_s += 2 * routes.PATIENCE_S
    for number in range(50):
        ranks = await router.choose_replicas(REPLICAS, pending(distinct(grant(), 10 + number)))
        assert len(ranks) == 2 and ranks[0][0].replica_id.unique_id == "d"


async def test_who_failed_a_call_is_forgotten_also_where_calls_are_spread(router: Any, clock: SimpleNamespace):
    await first_rank(router, pending(distinct(grant("a"), 1)))
    clock.now_s += 2 * routes.BLAMED_S
    await first_rank(router, pending(distinct(grant("b"), 2)))
    assert routes._blamed_s.keys() == {"b"}
