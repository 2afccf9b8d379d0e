"""Whether decode's steps leave the cores to prefill: only where both pools compute on the same ones, and whichever
replica of those the prompt is for."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.config import load_config
from shoal.decode import stage
from shoal.decode.stage import choose_yield_s
from shoal.decode.yielding import MAX_YIELD_S, VARIABLE, YIELD_S, OnTheirWay


@pytest.mark.parametrize(
    ("settings", "num_replicas", "device", "expected"),
    [
        ({}, 1, "cpu", YIELD_S),
        ({}, 1, "cuda", 0.0),
        ({"prefill": {"device": "cuda"}}, 1, "cpu", 0.0),
        ({"prefill": {"num_gpus": 1}}, 1, "cpu", 0.0),
        ({"ray": {"address": "auto"}}, 1, "cpu", 0.0),  # whose replicas may be on other machines
        ({"prefill": {"num_threads": 1}, "decode": {"num_threads": 3}}, 1, "cpu", 0.0),  # four cores are enough
        ({"prefill": {"num_threads": 2}, "decode": {"num_threads": 3}}, 1, "cpu", YIELD_S),
        ({}, 2, "cpu", 2 * YIELD_S),  # together as many steps as one would make
        ({}, 64, "cpu", MAX_YIELD_S),
        ({"ray": {"address": "auto"}}, 64, "cpu", 0.0),
        ({"handoff": {"yield_s": 0.3}, "ray": {"address": "auto"}}, 1, "cuda", 0.3),
        ({"handoff": {"yield_s": 0}}, 1, "cpu", 0.0),
    ],
)
def test_where_it_yields(
    settings: dict[str, Any], num_replicas: int, device: str, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "usable_threads", lambda: 4)
    assert choose_yield_s(load_config(**settings), num_replicas, torch.device(device)) == expected


def test_each_replica_knows_whether_prompts_are_on_their_way_to_any(tmp_path: Path) -> None:
    path = tmp_path / "file"
    third = OnTheirWay(path)
    with closing(OnTheirWay(path)) as first, closing(OnTheirWay(path)) as second:
        assert not first(False)
        assert first(True)
        assert second(False) and third(False)
        assert second(True)
        assert first(False)  # the second one still has some
        assert not second(False)
        assert not first(False) and not third(False)
        assert third(True) and first(False)
        third.close()
        assert not first(False)


def test_a_dead_replica_has_none(tmp_path: Path) -> None:
    path = tmp_path / "file"
    code = f"""
import time, pathlib
from shoal.decode.yielding import OnTheirWay
assert OnTheirWay(pathlib.Path({str(path)!r}))(True)
print("told", flush=True)
time.sleep(3600)
"""
    with closing(OnTheirWay(path)) as living:
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None and other.stdout.readline() == "told\n"
            assert living(False)
            other.kill()
        assert not living(False)


def test_replicas_know_of_one_another_by_what_their_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert OnTheirWay.of_this_process() is None
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    first, second = OnTheirWay.of_this_process(), OnTheirWay.of_this_process()
    assert first is not None and second is not None
    with closing(first), closing(second):
        assert first(True) and second(False)


def test_without_a_lock_to_have_a_replica_goes_by_itself(tmp_path: Path) -> None:
    replica = OnTheirWay(tmp_path / "file")
    replica.close()  # as if the system had none left
    assert replica(True) and not replica(False)
