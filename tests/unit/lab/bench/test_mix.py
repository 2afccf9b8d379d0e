"""What --mix, --rate and --concurrency may say."""

from __future__ import annotations

import pytest

from shoal.errors import ConfigError
from shoal_lab.bench.load import Load, parse_concurrency, parse_rates
from shoal_lab.bench.mix import RequestClass, Slo, parse_mix

SLO = Slo(1000, 100)


def test_classes_have_lengths_shares_and_their_own_slos():
    mix = parse_mix("1500-2000:64:0.3, 100:32-64:0.7:200:50", SLO)
    assert mix == (
        RequestClass((1500, 2000), (64, 64), 0.3, SLO), RequestClass((100, 100), (32, 64), 0.7, Slo(200, 50))
    )  # fmt: skip
    assert [one.name for one in mix] == ["1500-2000:64", "100:32-64"]
    assert parse_mix("8:8", SLO)[0].share == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "write prompt:output"),
        ("100:64:1:200", "write prompt:output"),
        ("100-:64", "write prompt:output"),
        ("100:64:x", "write prompt:output"),
        ("100:64:0", "leave out the class"),
        ("100:64:nan", "no share"),
        ("100:64:1:0:50", "more than 0"),
        ("0:64", "begin with 1 token"),
        ("20-10:64", "smaller end"),
        ("100:64:1,100:64:2", "one class twice"),
    ],
)
def test_a_mix_that_is_none_is_refused_with_what_to_write(text: str, says: str):
    with pytest.raises(ConfigError, match=says):
        parse_mix(text, SLO)


@pytest.mark.parametrize("slo", [(0, 100), (100, -1), (float("nan"), 1), (100, float("inf"))])
def test_slos_are_more_than_nothing_and_finite(slo: tuple[float, float]):
    with pytest.raises(ConfigError, match="more than 0, and finite"):
        Slo(*slo)


def test_loads_are_sorted_and_each_is_there_once():
    assert parse_rates("4,0.5,4") == (Load(rate=0.5), Load(rate=4.0))
    assert parse_concurrency("8,1") == (Load(concurrency=1), Load(concurrency=8))
    assert [load.name for load in (Load(rate=0.5), Load(concurrency=8))] == ["0.5 requests/s", "8 at a time"]


@pytest.mark.parametrize("text", ["x", "0", "nan", "inf", "1e9"])
def test_a_rate_that_is_none_is_refused(text: str):
    with pytest.raises(ConfigError, match="or sweep:0"):
        parse_rates(text)


@pytest.mark.parametrize("text", ["", "0", "1.5"])
def test_a_concurrency_that_is_none_is_refused(text: str):
    with pytest.raises(ConfigError, match="1,8,32"):
        parse_concurrency(text)
