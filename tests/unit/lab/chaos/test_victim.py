"""Who is hit: the one of its pool that holds most."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.cluster.directory import Entry
from shoal.config import ShoalConfig
from shoal_lab.chaos.look import Look, Scraped
from shoal_lab.chaos.victim import Victim

METRICS = """\
# TYPE shoal_kv_blocks gauge
shoal_kv_blocks{{state="free"}} {free}
shoal_kv_blocks{{state="reserved"}} {reserved}
shoal_kv_blocks{{state="used"}} {used}
"""


def entry(name: str) -> Entry:
    return Entry("shoal", "decode", name, name, "node", 1, "127.0.0.1:1")


def scraped(name: str, free: int, reserved: int, used: int) -> Scraped:
    return Scraped.of("decode", name, METRICS.format(free=free, reserved=reserved, used=used))


IDLE = Look((scraped("a", 9, 0, 0), scraped("b", 9, 0, 0)))
BUSY = Look((scraped("a", 7, 1, 1), scraped("b", 5, 1, 3), scraped("c", 6, 3, 0)))


def victim(monkeypatch: pytest.MonkeyPatch, *looks: Look) -> Victim:
    coming = list(looks)

    async def look(_: Any) -> Look:
        return coming.pop(0) if len(coming) > 1 else coming[0]

    async def entries(_: Any, _role: Any = None) -> tuple[Entry, ...]:
        return tuple(map(entry, "abcd"))

    monkeypatch.setattr(Victim, "look", look)
    monkeypatch.setattr(Victim, "entries", entries)
    none: Any = None
    return Victim(none, ShoalConfig(), none, none)


async def test_the_one_that_holds_most_is_hit_once_any_holds_something(monkeypatch: pytest.MonkeyPatch) -> None:
    found = await victim(monkeypatch, IDLE, BUSY).busiest("decode")
    assert [one.replica_id for one in found] == ["b", "c", "a", "d"]


async def test_who_does_not_answer_may_hold_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    found = await victim(monkeypatch, IDLE).left()  # two of decode are there, one wanted
    assert found == {"gateway that doesn't answer": 1.0, "prefill that doesn't answer": 1.0}
