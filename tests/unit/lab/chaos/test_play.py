from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from shoal_lab.chaos.look import Look, Scraped
from shoal_lab.chaos.play import Limits, _left, _recover, _repairs
from shoal_lab.chaos.scenario import Scenario, Sign

METRICS = """\
# HELP shoal_kv_fallback_total Steps down.
# TYPE shoal_kv_fallback_total counter
shoal_kv_fallback_total{{reason="peer_gone",rung="local"}} {local}
shoal_kv_fallback_total{{reason="lease_lost",rung="local"}} 5
# HELP shoal_retries_total Retries.
# TYPE shoal_retries_total counter
shoal_retries_total{{reason="peer_gone"}} {retries}
# HELP shoal_kv_verify_failures_total Checks.
# TYPE shoal_kv_verify_failures_total counter
shoal_kv_verify_failures_total{{check="checksum"}} {local}
"""


def look(**values: tuple[int, int]) -> Look:
    texts = {name: METRICS.format(local=local, retries=retries) for name, (local, retries) in values.items()}
    return Look(tuple(Scraped.of("decode", name, text) for name, text in texts.items()))


def test_repairs_are_told_apart_and_those_of_a_new_process_count_from_zero():
    found = _repairs(look(a=(1, 2), gone=(7, 7)), look(a=(3, 2), new=(1, 0)))
    assert found == {
        "kv_fallback peer_gone local": 3,
        "kv_fallback lease_lost local": 5,
        "kv_verify_failures checksum": 3,
    }


class Silent:
    """Says what it was given, and then nothing any more."""

    settle_s = 0.1

    def __init__(self, *said: dict[str, float]) -> None:
        self._said = list(said)

    async def left(self) -> dict[str, float]:
        if not self._said:
            await asyncio.Event().wait()
        return self._said.pop(0)


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ([], {"what nobody could tell": 1.0}),
        ([{"held blocks": 2.0}], {"held blocks": 2.0}),
        ([{}], {}),
    ],
)
async def test_silence_is_not_taken_for_nothing(said: list[dict[str, float]], found: dict[str, float]) -> None:
    victim: Any = Silent(*said)
    assert await _left(victim) == found


class Healing:
    """Whole ``after_s`` from now on."""

    hold_s = 0.0

    def __init__(self, after_s: float) -> None:
        self._whole_at = asyncio.get_running_loop().time() + after_s

    async def num_transfers(self) -> dict[str, float]:
        return {}

    async def is_whole(self) -> bool:
        return asyncio.get_running_loop().time() >= self._whole_at


@pytest.mark.parametrize(
    ("inject_s", "heals_after_s", "recovers"), [(0.3, 0.3, True), (0.0, 9.0, False), (9.0, 0.0, False)]
)
async def test_what_is_done_and_what_comes_of_it_have_each_their_time(
    inject_s: float, heals_after_s: float, recovers: bool
) -> None:
    """Replicas that are replaced by others take minutes, before there is anything to recover from."""

    @asynccontextmanager
    async def inject(_: Any) -> AsyncIterator[tuple[()]]:
        await asyncio.sleep(inject_s)
        yield ()

    scene: Any = SimpleNamespace(victim=Healing(heals_after_s))
    scenario = Scenario("slow", "takes long", inject, holds=False, signs=frozenset({Sign.WHOLE}))
    limits = Limits(inject_within_s=60 if recovers else 0.5, recover_within_s=0.2)
    if recovers:
        assert await _recover(scene, scenario, limits) >= 0
    else:
        with pytest.raises(TimeoutError):
            await _recover(scene, scenario, limits)
