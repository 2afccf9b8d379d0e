"""K/V of one request that are no numbers stay its own: rows of others are padded, and not with what it wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from engines import assert_nothing_held, make_engine
from models import tiny_llama

from shoal.engine.engine import Engine
from shoal.engine.events import FailureEvent
from shoal.wire.messages import Depth, SamplingParams, Stage

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(torch.float32, layers=2)[1]


def run(engine: Any) -> tuple[set[str], set[str]]:
    failed: set[str] = set()
    answered: set[str] = set()
    while True:
        output = engine.step()
        failed |= {one.request_id for one in output.failures}
        answered |= {one.request_id for one in output.tokens if one.finish_reason is not None}
        if output.is_idle:
            return failed, answered


def test_what_a_failed_request_left_in_the_first_block_harms_nobody(model: Any) -> None:
    """The next holder of block 0 waits for its hand-off, so that what was there is still there."""
    engine = make_engine(model, 0)
    engine.submit_generate("waits", tuple(range(3, 9)), Depth.FULL, GREEDY, hold=True)
    engine.step()  # reserved: it has block 0, and nothing was written
    for layer in engine.runner.pool.layers:
        layer[0] = torch.nan
    engine.submit_generate("short", tuple(range(10, 19)), Depth.FULL, GREEDY)
    engine.submit_generate("long", tuple(range(20, 32)), Depth.FULL, GREEDY)
    failed, answered = run(engine)
    assert failed == set() and answered == {"short", "long"}


EVIL = (5, 6, 7, 8, 9, 10, 11, 12, 13)


@contextmanager
def first_of_evil_is_no_number(engine: Engine) -> Iterator[None]:
    weights = engine.runner.decoder.parameters.embedding
    kept = weights[EVIL[0]].clone()
    with torch.inference_mode():
        weights[EVIL[0]] = torch.nan
    try:
        yield
    finally:
        with torch.inference_mode():
            weights[EVIL[0]] = kept


def test_a_token_whose_embedding_is_no_number_fails_alone(model: Any) -> None:
    engine = make_engine(model, 0)
    with first_of_evil_is_no_number(engine):
        engine.submit_generate("evil", EVIL, Depth.FULL, GREEDY)  # first: block 0
        engine.submit_generate("short", tuple(range(10, 19)), Depth.FULL, GREEDY)
        engine.submit_generate("long", tuple(range(20, 32)), Depth.FULL, GREEDY)
        failed, answered = run(engine)
    assert failed == {"evil"} and answered == {"short", "long"}


@pytest.mark.parametrize("num_skipped", [0, 1])
@pytest.mark.parametrize("max_step_tokens", [512, 5])
def test_of_a_prompt_whose_kv_are_no_numbers_nothing_is_shipped(
    model: Any, num_skipped: int, max_step_tokens: int
) -> None:
    """Decode, which would find out by its own logits, computes it itself instead."""
    engine = make_engine(model, num_skipped, stage=Stage.PREFILL, max_step_tokens=max_step_tokens)
    prompts = {"evil": EVIL, "good": tuple(range(10, 19))}
    for name, prompt in prompts.items():
        engine.submit_prefill(name, len(prompt))
    engine.step()
    for name, prompt in prompts.items():
        engine.start_shipping(name, prompt)
    shipped: dict[str, set[int]] = {}
    failures: list[FailureEvent] = []
    with first_of_evil_is_no_number(engine):
        while not (output := engine.step()).is_idle:
            failures += output.failures
            for chunk in output.chunks:
                shipped.setdefault(chunk.request_id, set()).update(chunk.layers)
                engine.chunk_sent(chunk.request_id)
    assert shipped == {"good": {0, 1}}
    [failure] = failures
    assert failure.request_id == "evil" and "NaN" in str(failure.error)
    engine.finish("good")
    assert_nothing_held(engine)
