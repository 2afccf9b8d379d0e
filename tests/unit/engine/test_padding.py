"""K/V of one request that are no numbers stay its own: rows of others are padded, and not with what it wrote."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engines import make_engine
from models import tiny_llama
from shoal.messages import Depth, SamplingParams

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


def test_a_token_whose_embedding_is_no_number_fails_alone(model: Any) -> None:
    engine = make_engine(model, 0)
    weights = engine.runner.decoder.parameters.embedding
    kept = weights[5].clone()
    with torch.inference_mode():
        weights[5] = torch.nan
    try:
        engine.submit_generate("evil", (5, 6, 7, 8, 9, 10, 11, 12, 13), Depth.FULL, GREEDY)  # first: block 0
        engine.submit_generate("short", tuple(range(10, 19)), Depth.FULL, GREEDY)
        engine.submit_generate("long", tuple(range(20, 32)), Depth.FULL, GREEDY)
        failed, answered = run(engine)
    finally:
        with torch.inference_mode():
            weights[5] = kept
    assert failed == {"evil"} and answered == {"short", "long"}
