"""Who of a pool lives, as the directory says it, and while Ray's head says nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from shoal.cluster import directory
from shoal.cluster.directory import Entry, LivingPool
from shoal.wire.messages import Role

NOBODY: frozenset[str] = frozenset()


class Head:
    """Ray's, which one pool asks. ``healthy`` replicas and ``ill`` ones are registered; it answers, or fails, when it's
    ``free``."""

    def __init__(self) -> None:
        self.healthy, self.ill = "ab", ""
        self.num_asked = 0
        self.error: Exception | None = None
        self.free = threading.Event()
        self.free.set()
        self.now_s = 0.0
        self.pool = LivingPool("shoal", "decode", clock=lambda: self.now_s)

    def registered(self, app: str, role: Role) -> tuple[Entry, ...]:
        assert (app, role) == ("shoal", "decode")
        self.num_asked += 1
        assert self.free.wait(30)
        if self.error is not None:
            raise self.error
        return tuple(
            Entry(
                app,
                role,
                name,
                f"actor {name}",
                "node",
                1,
                "host:1",
                key=None if name == "a" else name.encode().hex(),
                is_healthy=name in self.healthy,
            )
            for name in self.healthy + self.ill
        )

    async def ids_later(self, by_s: float) -> frozenset[str]:
        self.now_s += by_s
        return await self.pool.ids()


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    head = Head()
    monkeypatch.setattr(directory, "registered", head.registered)
    monkeypatch.setattr(LivingPool, "PATIENCE_S", 0.01)
    yield head
    head.free.set()


async def test_those_that_hang_are_there_and_get_no_work(head: Head) -> None:
    head.ill = "c"
    assert await head.pool.ids() == {"a", "b"} and head.pool.unfit == {"c"}
    head.healthy, head.ill = "bc", ""
    assert await head.ids_later(2.0) == {"b", "c"} and head.pool.unfit == NOBODY


async def test_a_key_is_known_as_long_as_its_replica_is_fit(head: Head) -> None:
    assert head.pool.key_of("b") == b""
    head.ill = "c"
    await head.pool.ids()
    assert [head.pool.key_of(name) for name in ("a", "b", "c", "x")] == [b"", b"b", b"", b""]
    head.healthy, head.ill = "c", "b"
    await head.ids_later(2.0)
    assert [head.pool.key_of(name) for name in "bc"] == [b"", b"c"]


async def test_an_answer_is_believed_for_a_second_however_many_ask(head: Head) -> None:
    for _ in range(3):
        assert await head.pool.ids() == {"a", "b"}
    assert head.num_asked == 1
    assert await head.pool.ids(now=True) == {"a", "b"} and head.num_asked == 2


async def test_while_the_head_does_not_answer_those_that_were_there_last_are(head: Head) -> None:
    head.ill = "c"
    await head.pool.ids()
    head.healthy, head.ill = "a", ""
    head.free.clear()
    for _ in range(5):
        assert await head.ids_later(2.0) == {"a", "b"} and head.pool.unfit == {"c"}
        assert await head.pool.ids(now=True) == {"a", "b"}
    assert head.num_asked == 2, "one call waits for it, and no more"
    head.free.set()
    assert await head.pool._asking is None  # type: ignore[misc]
    assert await head.pool.ids() == {"a"} and head.pool.unfit == NOBODY


async def test_a_head_that_fails_is_asked_again_a_second_later(head: Head) -> None:
    await head.pool.ids()
    head.error, head.healthy = ConnectionError("no head"), "a"
    assert await head.ids_later(2.0) == {"a", "b"} and head.num_asked == 2
    for now in (False, True):
        assert await head.pool.ids(now=now) == {"a", "b"} and head.num_asked == 2
    head.error = None
    assert await head.ids_later(1.0) == {"a"} and head.num_asked == 3


@pytest.mark.parametrize("fails", [True, False])
async def test_where_nobody_was_known_nobody_is(head: Head, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LivingPool, "FIRST_S", 0.01)
    if fails:
        head.error = ConnectionError("no head")
    else:
        head.free.clear()
    assert await head.pool.ids() == await head.pool.ids() == NOBODY and head.num_asked == 1
    head.free.set()  # or the event loop's end would wait for it


async def test_where_nobody_was_known_the_first_answer_is_waited_for(head: Head) -> None:
    head.healthy = ""
    assert await head.pool.ids() == NOBODY
    head.healthy = "a"
    assert await head.pool.ids() == {"a"}, "an empty pool is asked for at once"
