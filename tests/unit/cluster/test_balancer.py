"""Which replica a call goes to, by what its caller has sent there itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from shoal.cluster.balancer import FIRST_WITHIN_S, HEARD_WITHIN_S, MAX_LONGER, PATIENCE_S, Balancer, Call

ALL = frozenset("abcd")


class Pool:
    """A balancer with calls that stay open; ``now_s`` is its clock."""

    def __init__(self, pack_up_to: int = 0) -> None:
        self.now_s = 0.0
        self.balancer = Balancer(pack_up_to, lambda: self.now_s)
        self.held = ExitStack()

    def send(self, replica_id: str, *keys: bytes, number: int = 1) -> Call:
        """``number`` calls there, which it takes at once; the last one."""
        for _ in range(number):
            call = self.held.enter_context(self.balancer.call(replica_id, keys))
            self.balancer.accepted(call)
        return call

    def chosen(self, *keys: bytes, failed: str = "", of: frozenset[str] = ALL) -> set[str]:
        """Every replica that may come out, over many choices."""
        return {self.balancer.choose(of, keys, frozenset(failed)) for _ in range(200)}


@pytest.fixture
def pool() -> Iterator[Pool]:
    found = Pool()
    with found.held:
        yield found


@pytest.fixture
def packed() -> Iterator[Pool]:
    found = Pool(pack_up_to=4)
    with found.held:
        yield found


@pytest.mark.parametrize(("failed", "left"), [("", "abcd"), ("b", "acd"), ("abd", "c"), ("abcd", "abcd")])
def test_a_prompt_goes_to_none_that_has_failed_it_if_there_is_another(pool: Pool, failed: str, left: str):
    assert pool.chosen(failed=failed) == set(left)


def test_calls_that_come_at_once_are_spread(pool: Pool):
    sent: Counter[str] = Counter()
    for _ in range(64):
        sent[one := pool.balancer.choose(ALL)] += 1
        pool.send(one)
    assert all(12 <= sent[name] <= 20 for name in ALL), sent  # by chance alone, two of three times it wouldn't be so


def test_a_call_counts_for_as_long_as_it_is_open(pool: Pool):
    with pool.balancer.call("a"), pool.balancer.call("a"):
        assert pool.balancer.num_open("a") == 2
    assert pool.balancer.num_open("a") == 0
    assert not (pool.balancer._open or pool.balancer._underway or pool.balancer._unanswered)


def test_the_less_busy_one_of_two_gets_it(pool: Pool):
    pool.send("a", number=2)
    pool.send("b")
    assert pool.chosen(of=frozenset("ab")) == {"b"}


def test_one_that_does_not_take_a_call_in_time_comes_last_until_it_does(pool: Pool):
    """It may hang."""
    stuck = pool.held.enter_context(pool.balancer.call("a", (b"1",)))
    pool.send("b", number=4)
    two = frozenset("ab")
    assert pool.chosen(of=two) == pool.chosen(b"1", of=two) == {"a"}
    pool.now_s += 2 * PATIENCE_S
    assert pool.chosen(of=two) == pool.chosen(b"1", of=two) == {"b"}, "though it's busy"
    assert pool.chosen(of=frozenset("a")) == {"a"}, "there is no other"
    pool.balancer.accepted(stuck)
    assert pool.chosen(of=two) == {"a"}


def test_a_prompt_goes_where_its_beginning_went(pool: Pool):
    with pool.balancer.call("c", (b"1", b"12")):
        pass
    assert pool.chosen(b"1", b"13") == {"c"}
    assert pool.chosen(b"2") == ALL
    assert pool.chosen(b"1", of=frozenset("ab")) == {"a", "b"}, "it isn't there any more"
    assert "c" not in pool.chosen(b"1", failed="c")


@pytest.mark.parametrize(("more", "is_chosen"), [(MAX_LONGER, True), (MAX_LONGER + 1, False)])
def test_one_that_knows_a_beginning_and_is_too_busy_is_passed_over(pool: Pool, more: int, is_chosen: bool):
    for name in "abd":
        pool.send(name)
    pool.send("c", b"1", number=1 + more)
    assert (pool.chosen(b"1") == {"c"}) is is_chosen


def test_replicas_that_share_cores_are_filled_one_after_the_other(packed: Pool):
    sent = ""
    for _ in range(16):
        sent += (one := packed.balancer.choose(ALL))
        packed.send(one)
    assert sent == "aaaabbbbccccdddd"
    packed.send("a")
    assert packed.chosen() == {"b"}, "all are full: of the least busy, the first by name"


@pytest.mark.parametrize(("open_calls", "chosen"), [(7, "b"), (8, "a")])
def test_a_packed_pool_sends_a_known_beginning_where_it_is_while_there_is_room(open_calls: int, chosen: str):
    pool = Pool(pack_up_to=8)
    with pool.held:
        pool.send("a", number=3)
        pool.send("b", b"1", number=open_calls)
        assert pool.chosen(b"1", of=frozenset("abc")) == {chosen}


def test_packing_gives_no_more_than_its_part_to_who_has_failed_a_call_just_now(packed: Pool):
    packed.send("b", b"1", number=2)
    packed.send("c", number=3)
    three = frozenset("abc")
    assert packed.balancer.choose(three, (), frozenset("c")) == "b"
    assert packed.balancer.choose(three, (), frozenset("cb")) == "a"
    assert packed.chosen(b"1", of=three) == {"a"}, "also if it knows the beginning"
    packed.now_s += 1.5 * HEARD_WITHIN_S
    packed.balancer.choose(three)
    assert not packed.balancer._failed_s


def test_packing_gives_no_more_than_its_part_to_who_is_not_heard_of_while_a_call_waits(packed: Pool):
    """It may hang. Who brings something of other calls doesn't, however long a prompt takes."""
    waits, other = packed.send("a"), packed.send("a")
    packed.now_s += 2 * HEARD_WITHIN_S
    assert packed.chosen() == {"b"}
    packed.balancer.heard(other)
    assert packed.chosen() == {"a"}
    packed.now_s += 2 * HEARD_WITHIN_S
    assert packed.chosen() == {"b"}
    packed.balancer.heard(waits)
    packed.now_s += 2 * HEARD_WITHIN_S
    assert packed.chosen() == {"a"}, "nobody waits there for a first answer"


def test_packing_gives_no_more_than_its_part_to_who_lets_a_call_wait_for_very_long(packed: Pool):
    """It may have no memory left for K/V, though others have."""
    waits, other = packed.send("a"), packed.send("a")
    packed.now_s += 2 * FIRST_WITHIN_S
    packed.balancer.heard(other)
    assert packed.chosen() == {"b"}
    packed.balancer.heard(waits)
    assert packed.chosen() == {"a"}


@pytest.mark.parametrize("pack_up_to", [0, 4])
def test_a_choice_takes_no_longer_the_more_calls_are_open(pack_up_to: int, monkeypatch: pytest.MonkeyPatch):
    """Each call of a burst is chosen for while those before it are open, some of them for long."""
    pool, looks = Pool(pack_up_to), SimpleNamespace(number=0)
    own = Call.__hash__

    def counting(call: Call) -> int:
        looks.number += 1
        return own(call)

    monkeypatch.setattr(Call, "__hash__", counting)
    with pool.held:
        for _ in range(500):
            before = looks.number
            one = pool.balancer.choose(ALL)
            assert looks.number == before
            pool.held.enter_context(pool.balancer.call(one))
            pool.now_s += HEARD_WITHIN_S / 100
