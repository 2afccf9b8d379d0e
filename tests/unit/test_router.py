"""Which prefill replica a grant goes to."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest

from shoal import routes
from shoal.messages import Grant, RequestContext
from shoal.router import GrantRouter

REPLICAS = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in "abcd"]


@pytest.fixture
def router() -> Any:
    return object.__new__(GrantRouter)  # Serve makes it, with what only Serve has; choosing needs none of that


def grant(*excluded: str) -> Grant:
    context = RequestContext("one", timeout_s=1)
    return Grant(b"1" * 16, "127.0.0.1:1", "plan", 3, 0, 5.0, 30.0, context, frozenset(excluded))


def pending(*args: Any) -> Any:
    return SimpleNamespace(args=list(args))


async def chosen(router: Any, replicas: list[Any], request: Any) -> set[str]:
    """Every replica that may come out, over many choices; each choice is of at most two."""
    found: set[str] = set()
    for _ in range(200):
        for rank in await router.choose_replicas(replicas, request):
            assert 1 <= len(rank) <= 2 and len({id(replica) for replica in rank}) == len(rank)
            found |= {replica.replica_id.unique_id for replica in rank}
    return found


@pytest.mark.parametrize(
    ("excluded", "left"), [("", "abcd"), ("b", "acd"), ("abd", "c"), ("abcd", "abcd"), ("xy", "abcd")]
)
async def test_a_grant_goes_to_none_that_it_excludes_if_there_is_another(router: Any, excluded: str, left: str):
    assert await chosen(router, REPLICAS, pending(grant(*excluded))) == set(left)


async def test_other_calls_go_anywhere(router: Any):
    assert await chosen(router, REPLICAS, pending()) == set("abcd")
    assert await chosen(router, REPLICAS, None) == set("abcd")


async def test_without_replicas_there_is_nothing_to_choose(router: Any):
    assert await router.choose_replicas([], pending(grant())) == []


def test_it_is_known_where_a_grant_went_for_as_long_as_there_is_a_grant(router: Any):
    one = grant()
    before = routes.num_noted()
    assert routes.replica_of(one) is None
    router.on_request_routed(pending(one), SimpleNamespace(unique_id="c"), None)
    assert routes.replica_of(one) == "c"
    del one
    gc.collect()
    assert routes.num_noted() == before
