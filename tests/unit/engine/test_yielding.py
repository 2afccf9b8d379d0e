"""When an engine waits before a step: what engine/yielding.py decides, and nothing of time passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import make_engine
from models import tiny_llama

from shoal.engine.engine import HURRIED_S
from shoal.engine.scheduler import Scheduler
from shoal.engine.yielding import LOOK_S, NEVER, Yielding
from shoal.wire.messages import Depth, SamplingParams

ALWAYS = Yielding(1.0, lambda _to_this: True)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(torch.float32, layers=2)[1]


def answering(model: Any, timeout_s: float, now_s: float = 100.0) -> Scheduler:
    """Of an engine that has said an answer's first token."""
    engine = make_engine(model, 0)
    engine._clock = lambda: now_s
    engine.submit_generate("answer", (1, 2), Depth.FULL, SamplingParams(max_tokens=4), timeout_s=timeout_s)
    while not engine.step().tokens:
        pass
    return engine.scheduler


def test_it_waits_until_the_pause_is_over_and_looks_again_before(model: Any) -> None:
    scheduler = answering(model, 600.0)
    assert ALWAYS.wait_s(scheduler, 100.0, 100.0) == LOOK_S
    assert ALWAYS.wait_s(scheduler, 100.0, 100.99) == pytest.approx(0.01)
    assert ALWAYS.wait_s(scheduler, 100.0, 101.0) == ALWAYS.wait_s(scheduler, 100.0, 200.0) == 0
    assert NEVER.wait_s(scheduler, 100.0, 100.0) == 0
    assert Yielding(1.0).wait_s(scheduler, 100.0, 100.0) == 0  # nothing is on its way here


def test_whose_time_ends_soon_waits_no_more(model: Any) -> None:
    scheduler = answering(model, HURRIED_S + 10)
    assert ALWAYS.wait_s(scheduler, 109.5, 109.9) == LOOK_S
    assert ALWAYS.wait_s(scheduler, 109.5, 110.0) == 0


def test_what_is_on_its_way_here_is_told_whether_it_waits_or_not(model: Any) -> None:
    told: list[bool] = []
    engine = make_engine(model, 0)
    yielding = Yielding(1.0, lambda to_this: bool(told.append(to_this)))
    assert yielding.wait_s(engine.scheduler, 0.0, 0.0) == 0
    engine.submit_generate("held", (1, 2), Depth.FULL, SamplingParams(max_tokens=4), hold=True)
    engine.step()
    assert yielding.wait_s(engine.scheduler, 0.0, 0.0) == 0
    assert told == [False, True]
