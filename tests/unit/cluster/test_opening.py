"""Opening both stages in one process: what is given back where that fails, and what they share."""

from __future__ import annotations

import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from models import save_tiny

import shoal.cluster.local
import shoal.decode.stage
import shoal.prefill.stage
from shoal.cluster.local import open_local
from shoal.config import ShoalConfig, load_config


@pytest.mark.parametrize(
    ("module", "last"), [(shoal.decode.stage, "DecodeWorker"), (shoal.prefill.stage, "PrefillWorker")]
)
async def test_no_thread_is_left_where_the_last_part_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, last: str
):
    save_tiny(tmp_path)
    opened: set[threading.Thread] = set()
    before = set(threading.enumerate())

    def fails(*_parts: Any, **_options: Any) -> None:
        opened.update(set(threading.enumerate()) - before)
        raise MemoryError("no room for more")

    monkeypatch.setattr(module, last, fails)
    with pytest.raises(MemoryError, match="no room for more"):
        async with open_local(load_config(model={"name": str(tmp_path)})):
            pass
    assert {thread.name for thread in opened} >= {f"shoal-{module.__name__.split('.')[1]}"}
    assert not [thread.name for thread in opened if thread.is_alive()]


async def test_two_stages_of_one_process_share_what_they_may_take_of_a_gpu(monkeypatch: pytest.MonkeyPatch):
    told: list[ShoalConfig] = []

    def open_decode(config: ShoalConfig, *_parts: Any, **_options: Any) -> None:
        told.append(config)
        raise MemoryError("no room for more")

    monkeypatch.setattr(shoal.cluster.local, "open_decode", open_decode)
    with pytest.raises(MemoryError):
        async with open_local(load_config(prefill={"num_gpus": 1}, decode={"num_gpus": 4})):
            pass
    assert [(config.prefill.num_gpus, config.decode.num_gpus) for config in told] == [(0.5, 0.5)]
