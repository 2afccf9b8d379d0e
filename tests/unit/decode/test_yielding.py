"""Whether decode's steps leave the cores to prefill: only where both pools compute on the same ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.config import load_config
from shoal.decode import stage
from shoal.decode.stage import YIELD_S, choose_yield_s


@pytest.mark.parametrize(
    ("settings", "device", "expected"),
    [
        ({}, "cpu", YIELD_S),
        ({}, "cuda", 0.0),
        ({"prefill": {"device": "cuda"}}, "cpu", 0.0),
        ({"prefill": {"num_gpus": 1}}, "cpu", 0.0),
        ({"ray": {"address": "auto"}}, "cpu", 0.0),  # whose replicas may be on other machines
        ({"prefill": {"num_threads": 1}, "decode": {"num_threads": 3}}, "cpu", 0.0),  # four cores are enough
        ({"prefill": {"num_threads": 2}, "decode": {"num_threads": 3}}, "cpu", YIELD_S),
        ({"handoff": {"yield_s": 0.2}, "ray": {"address": "auto"}}, "cuda", 0.2),
        ({"handoff": {"yield_s": 0}}, "cpu", 0.0),
    ],
)
def test_where_it_yields(
    settings: dict[str, Any], device: str, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "usable_threads", lambda: 4)
    assert choose_yield_s(load_config(**settings), torch.device(device)) == expected
