"""A step that nobody waits for ends at its next layer, and one that somebody does goes on."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch
from engines import make_engine
from models import tiny_llama

from shoal.engine.client import EngineClient
from shoal.engine.engine import Engine
from shoal.engine.tables import Reuse
from shoal.wire.messages import Depth, SamplingParams, Stage

SAMPLING = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
PROMPT = tuple(3 + index * 7 % 90 for index in range(40))
OTHER = PROMPT[::-1]
NUM_LAYERS = 4


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(torch.float32, layers=NUM_LAYERS)[1]


def submit(engine: Engine, request_id: str, prompt: tuple[int, ...]) -> None:
    engine.submit_generate(request_id, prompt, Depth.FULL, SAMPLING)


def leaving(engine: Engine, request_id: str, at_layer: int = 2) -> list[str]:
    """Let a request be left as the step to come begins its layer ``at_layer``; what is returned gets an item for each
    layer begun, and one for logits."""
    begun: list[str] = []

    def progressed() -> None:
        begun.append("begun")
        if len(begun) == at_layer:
            engine.desertion.leave(request_id)

    engine.told_of_progress(progressed)
    return begun


def run(engine: Engine) -> dict[str, list[int]]:
    """Step until nothing can run; each request's tokens."""
    tokens: dict[str, list[int]] = {}
    while not (output := engine.step()).is_idle:
        assert not output.failures
        for token in output.tokens:
            assert not token.num_present
            tokens.setdefault(token.request_id, []).append(token.token_id)
    return tokens


def alone(model: Any, prompt: tuple[int, ...]) -> list[int]:
    engine = make_engine(model, 0)
    submit(engine, "alone", prompt)
    return run(engine)["alone"]


def test_a_step_that_nobody_waits_for_ends_at_its_next_layer(model: Any) -> None:
    engine = make_engine(model, 0, reuse=Reuse.EXACT)
    begun = leaving(engine, "left")
    submit(engine, "left", PROMPT)
    assert run(engine) == {} and len(begun) == 2
    engine.finish("left")
    assert engine.counts().num_free_blocks == engine.counts().num_blocks
    # Nothing of it is remembered, and the next one of its name is wanted.
    submit(engine, "left", PROMPT)
    assert run(engine)["left"] == alone(model, PROMPT) and len(begun) >= 2 + NUM_LAYERS


def test_who_shares_a_step_with_one_that_has_left_gets_its_tokens(model: Any) -> None:
    engine = make_engine(model, 0)
    begun = leaving(engine, "left")
    submit(engine, "left", PROMPT)
    submit(engine, "stays", OTHER)
    tokens = run(engine)
    assert len(begun) > NUM_LAYERS
    engine.finish("left")
    assert (tokens | run(engine))["stays"] == alone(model, OTHER)


@pytest.mark.parametrize("at_layer", [1, 2, 4, 5, 6])
def test_what_prefill_computes_for_nobody_ends_too(model: Any, at_layer: int) -> None:
    """Also where it's left as what it computed is taken for the wire, which is its fourth part, or projected."""
    engine = make_engine(model, 1, stage=Stage.PREFILL)
    begun = leaving(engine, "left", at_layer)
    for request_id, prompt in (("left", PROMPT), ("stays", OTHER)):
        begun.clear()
        engine.submit_prefill(request_id, len(prompt))
        assert engine.step().reserved
        engine.start_shipping(request_id, prompt)
        chunks = []
        while not (output := engine.step()).is_idle:
            assert not output.failures
            chunks += output.chunks
        if request_id == "stays":
            assert chunks and chunks[-1].is_whole and chunks[-1].end == len(prompt) - 1
        elif at_layer <= NUM_LAYERS:
            assert not chunks and len(begun) == at_layer
        engine.finish(request_id)
    assert engine.counts().num_free_blocks == engine.counts().num_blocks


def test_a_step_that_only_goes_on_is_run_to_its_end(model: Any) -> None:
    """A graph may be captured by it, which others' steps are to run."""
    engine = make_engine(model, 0)
    submit(engine, "left", PROMPT)
    while not engine.step().tokens:
        pass
    begun = leaving(engine, "left", at_layer=1)
    assert engine.step().tokens and len(begun) >= NUM_LAYERS


async def test_whoever_leaves_an_engine_lets_go_of_its_step(model: Any) -> None:
    engine = make_engine(model, 0)
    begun, may_go_on, count = threading.Event(), threading.Event(), [0]
    attention = engine.runner.decoder._attention

    def counted(*arguments: Any) -> Any:
        count[0] += 1
        begun.set()
        assert may_go_on.wait(10)
        return attention(*arguments)

    engine.runner.decoder._attention = counted  # type: ignore[method-assign]
    client = EngineClient(engine, name="test")
    try:
        with client.open("left"):
            await client.call(lambda engine: submit(engine, "left", PROMPT))
            assert await asyncio.to_thread(begun.wait, 10)
        may_go_on.set()
        counts = await client.call(Engine.counts)
        assert counts.num_free_blocks == counts.num_blocks and count == [1]
    finally:
        client.close()
