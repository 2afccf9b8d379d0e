"""Whether decode's steps leave the cores to prefill: only where both pools compute on the same ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.config import load_config
from shoal.decode import stage
from shoal.decode.stage import choose_yield_s
from shoal.decode.yielding import MAX_YIELD_S, YIELD_S


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
        ({}, 64, "cpu", YIELD_S),  # one is filled before another one has anything to do
        ({"decode": {"pack_up_to": 0}}, 2, "cpu", 2 * YIELD_S),  # together as many steps as one would make
        ({"decode": {"pack_up_to": 0}}, 64, "cpu", MAX_YIELD_S),
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
