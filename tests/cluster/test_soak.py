"""What the soak test calls growth: every leak is found, and noise is none."""

from __future__ import annotations

import json
import mmap
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TIMES_S = [15.0 * number for number in range(30)]


@pytest.fixture
def flatness(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import flatness  # type: ignore[import-not-found, unused-ignore]

    return flatness


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import soak  # type: ignore[import-not-found, unused-ignore]

    return soak


@pytest.fixture
def footprint(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import footprint  # type: ignore[import-not-found, unused-ignore]

    return footprint


def noise(seed: int, size: float) -> list[float]:
    chance = random.Random(seed)
    return [chance.gauss(0, size) for _ in TIMES_S]


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_growth(flatness: Any, seed: int) -> None:
    values = [400 + one for one in noise(seed, 5.0)]
    assert not flatness.trend_of(TIMES_S, values).grows(allowance=2.0)


@pytest.mark.parametrize("seed", range(20))
def test_a_leak_is_found_under_noise_of_its_own_size(flatness: Any, seed: int) -> None:
    values = [400 + 20 * index / len(TIMES_S) + one for index, one in enumerate(noise(seed, 5.0))]
    trend = flatness.trend_of(TIMES_S, values)
    assert trend.grows(allowance=8.0) and 8 < trend.rise < 35


def test_one_file_that_stays_open_every_few_rounds_is_found(flatness: Any) -> None:
    assert flatness.trend_of(TIMES_S, [60.0 + index // 6 for index in range(30)]).grows(allowance=1.5)


def test_what_never_changes_is_flat(flatness: Any) -> None:
    trend = flatness.trend_of(TIMES_S, [7.0] * 30)
    assert (trend.level, trend.rise, trend.sigmas) == (7.0, 0.0, 0.0) and not trend.grows(0.0)


def test_one_outlier_is_no_growth(flatness: Any) -> None:
    assert not flatness.trend_of(TIMES_S, [7.0] * 29 + [900.0]).grows(allowance=1.5)


def test_what_falls_does_not_grow(flatness: Any) -> None:
    assert not flatness.trend_of(TIMES_S, [float(-index) for index in range(30)]).grows(allowance=1.5)


@pytest.mark.parametrize(("num_samples", "grows"), [(0, False), (1, False), (7, False), (8, True)])
def test_of_too_few_samples_nothing_is_said_to_grow_and_that_is_a_fault(
    soak: Any, footprint: Any, num_samples: int, grows: bool
) -> None:
    """Even though each has twice as much of everything as the one before."""
    held = [footprint.Footprint(*[2**number * 2**30] * 4) for number in range(num_samples)]
    verdicts = soak.judge([soak.Sample(15.0 * number, "decode", 1, one) for number, one in enumerate(held)])
    faults = tuple(soak.too_short(verdicts))
    assert [verdict.grows for verdict in verdicts] == [grows] * (4 if num_samples else 0)
    assert bool(faults) is not grows and not soak.Soak((), soak.Tally(), verdicts, faults).is_flat
    assert {verdict.says for verdict in verdicts} == ({"GROWS" if grows else "too short"} if num_samples else set())


def test_a_process_is_seen_to_hold_what_it_holds(footprint: Any, tmp_path: Path) -> None:
    before = footprint.Footprint.of(os.getpid())
    may_end = threading.Event()
    thread = threading.Thread(target=may_end.wait, args=(20,))
    thread.start()
    # Pages of its own: what malloc gives may have been here before.
    held = mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held.write(b"x" * len(held))
    with (tmp_path / "open").open("w"):
        now = footprint.Footprint.of(os.getpid())
    may_end.set()
    thread.join()
    assert now.num_threads == before.num_threads + 1 and now.num_files == before.num_files + 1
    assert now.memory_bytes - before.memory_bytes > len(held) * 0.9


@pytest.mark.cluster
@pytest.mark.long
@pytest.mark.timeout(180)
def test_a_short_run_holds_nothing_between_its_rounds(tmp_path: Path) -> None:
    """The whole script. In half a minute memory is still warming up: its trend is told, and judged where it's long."""
    command = [sys.executable, str(BENCHMARKS / "soak.py"), "--minutes", "0.4", "--round-s", "3", "--warm-up", "0"]
    figures = tmp_path / "soak.json"
    done = subprocess.run([*command, "--json", str(figures)], capture_output=True, text=True, timeout=170, check=False)
    assert "fault" not in done.stdout, done.stdout + done.stderr
    assert "answered as they should be" in done.stdout, done.stdout + done.stderr
    assert json.loads(figures.read_text(encoding="utf-8"))["samples"]
