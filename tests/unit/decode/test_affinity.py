"""Where prompts that begin alike go."""

from __future__ import annotations

from shoal.decode.affinity import KEY_TOKENS, MAX_KEYS, Affinity, prefix_keys

PROMPT = tuple(range(1000, 1000 + 3 * KEY_TOKENS + 5))


def test_prompts_that_begin_alike_have_the_same_first_keys():
    keys = prefix_keys("a", PROMPT)
    assert len(keys) == len(set(keys)) == 3
    other = (*PROMPT[: 2 * KEY_TOKENS], 7, *PROMPT[2 * KEY_TOKENS + 1 :])
    assert prefix_keys("a", other)[:2] == keys[:2] and prefix_keys("a", other)[2] != keys[2]


def test_a_key_stands_for_all_that_comes_before_it():
    other = (7, *PROMPT[1:])
    assert not set(prefix_keys("a", other)) & set(prefix_keys("a", PROMPT))


def test_tenants_have_nothing_in_common():
    assert not set(prefix_keys("a", PROMPT)) & set(prefix_keys("b", PROMPT))


def test_short_prompts_have_none_and_long_ones_no_more_than_decide():
    assert prefix_keys("a", PROMPT[: KEY_TOKENS - 1]) == ()
    assert len(prefix_keys("a", range(2 * MAX_KEYS * KEY_TOKENS))) == MAX_KEYS


def test_the_longest_beginning_that_is_known_decides():
    affinity = Affinity()
    affinity.note([b"1", b"12"], "x")
    affinity.note([b"1", b"13"], "y")
    assert affinity.best([b"1", b"12", b"124"], {"x", "y"}) == "x"
    assert affinity.best([b"1", b"14"], {"x", "y"}) == "y"  # the last that got it
    assert affinity.best([b"2"], {"x", "y"}) is None
    assert affinity.best([], {"x"}) is None


def test_a_replica_that_is_gone_is_not_named():
    affinity = Affinity()
    affinity.note([b"1"], "x")
    affinity.note([b"12"], "y")
    assert affinity.best([b"1", b"12"], {"x"}) == "x"
    assert affinity.best([b"1", b"12"], {"z"}) is None


def test_the_oldest_are_forgotten():
    affinity = Affinity(max_remembered=2)
    for key in (b"1", b"2", b"1", b"3"):
        affinity.note([key], "x")
    assert len(affinity) == 2
    assert [affinity.best([key], {"x"}) for key in (b"1", b"2", b"3")] == ["x", None, "x"]
