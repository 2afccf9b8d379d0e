"""What a start-up says that it waits for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoal.backends.cpu import build
from shoal.cluster.progress import waits_for_compiler
from shoal.config import ShoalConfig


@pytest.fixture(autouse=True)
def nothing_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.FOLDER_VARIABLE, str(tmp_path / "kernels"))
    monkeypatch.setattr(build, "cpu_flags", lambda: build.TARGETS[0].flags)
    monkeypatch.setattr(build, "compiler", lambda: ["g++"])


TORCH: dict[str, Any] = {"kernels": "torch"}
GPU: dict[str, Any] = {"num_gpus": 1}


@pytest.mark.parametrize(
    ("tree", "waits"),
    [
        ({}, True),
        ({"model": {"dtype": "float32"}}, False),
        ({"prefill": TORCH}, True),
        ({"prefill": TORCH, "decode": TORCH}, False),
        ({"prefill": GPU, "decode": GPU}, False),
        ({"ray": {"address": "auto"}}, False),
    ],
)
def test_kernels_are_waited_for_where_they_are_compiled(tree: dict[str, Any], waits: bool) -> None:
    assert waits_for_compiler(ShoalConfig(**tree)) is waits


def test_once_they_are_there_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_compile", lambda command, sources, path, within_s: path.write_bytes(b""))
    build.library()
    assert not waits_for_compiler(ShoalConfig())


def test_a_processor_that_has_none_waits_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset({"sse2"}))
    assert not waits_for_compiler(ShoalConfig())
