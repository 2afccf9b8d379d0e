"""What computes before the engine does leaves no threads behind that would compete with it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models import save_tiny
from shoal.config import load_config
from shoal.engine import build
from shoal.engine.build import load_stage
from shoal.errors import ModelError
from shoal.messages import Stage


@pytest.mark.parametrize("stage", Stage)
async def test_a_stage_loads_in_a_thread_that_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Stage):
    save_tiny(tmp_path)
    threads: list[threading.Thread] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:
            threads.append(threading.current_thread())
            return function(*args, **options)

        return noted

    for name in ("load_parameters", "build_engine"):
        monkeypatch.setattr(build, name, watched(getattr(build, name)))
    loaded = await load_stage(load_config(model={"name": str(tmp_path)}), stage)
    assert loaded.engine.scheduler.num_tokens_held > 0
    assert len(set(threads)) == 1 and len(threads) == 2
    assert threads[0] is not threading.main_thread() and not threads[0].is_alive()


async def test_what_cannot_be_loaded_says_so():
    with pytest.raises(ModelError, match="no model"):
        await load_stage(load_config(model={"name": "nowhere"}), Stage.DECODE)
