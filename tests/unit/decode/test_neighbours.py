"""Decode replicas of the same cores know whether prompts are on their way to any of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.decode.neighbours import Neighbours


@pytest.fixture
def three(tmp_path: Path) -> Iterator[list[Neighbours]]:
    replicas = [Neighbours(tmp_path / "file") for _ in range(3)]
    yield replicas
    for replica in replicas:
        replica.close()


def test_each_knows_whether_prompts_are_on_their_way_to_any(three: list[Neighbours]) -> None:
    first, second, third = three
    assert not first.are_on_their_way(False)
    assert first.are_on_their_way(True)
    assert second.are_on_their_way(False) and third.are_on_their_way(False)
    assert second.are_on_their_way(True)
    assert first.are_on_their_way(False)  # the second one still has some
    assert not second.are_on_their_way(False)
    assert not first.are_on_their_way(False) and not third.are_on_their_way(False)
    assert third.are_on_their_way(True) and first.are_on_their_way(False)
    third.close()
    assert not first.are_on_their_way(False)


def test_a_dead_one_has_none(three: list[Neighbours], tmp_path: Path) -> None:
    code = f"""
import pathlib, sys
from shoal.decode.neighbours import Neighbours
replica = Neighbours(pathlib.Path({str(tmp_path / "file")!r}))
assert replica.are_on_their_way(True)
print("told", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "told\n"
            assert three[0].are_on_their_way(False)
        finally:
            other.kill()
    assert not three[0].are_on_their_way(False)
