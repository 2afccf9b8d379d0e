"""The SPEED plan: deep layers hold anchors and full-depth tokens alone, and say what a slow reference says, in float64.

Tiny random models: an untuned one answers badly this way, but it must be the right bad answer.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import (
    Ask,
    exact,
    logits_after,
    make_engine,
    one_by_one,
    prefill_chunks,
    run,
    run_handed_off,
)  # fmt: skip
from models import save_tiny, tiny_model
from reference import speed_generate

from shoal.config import load_config
from shoal.engine.build import Served, build_engine, load_parameters, plan_of
from shoal.engine.engine import Engine
from shoal.errors import ConfigError, InvalidRequest
from shoal.model.families import describe
from shoal.model.files import locate
from shoal.model.plan import Anchors, LayerPlan
from shoal.wire.messages import Depth, PromptOutline, SamplingParams, Stage

LAYERS, SKIPPED, BLOCK = 6, 3, 4
LENGTHS = (1, 2, 3, 5, 16, 17, 33, 64)
# Anchors, what is known of the prompt, and how many first and last tokens are full depth.
CASES = [
    (Anchors(), PromptOutline(), 1, 1),
    (Anchors(5), PromptOutline(9, 3), 5, 3),
    (Anchors(system=True), PromptOutline(9, 3), 9, 3),
    (Anchors(system=True), PromptOutline(), 1, 1),
    (Anchors(100), PromptOutline(), 100, 1),
]
BOS, OUTLINE = Anchors(), PromptOutline(0, 2)


@pytest.fixture(scope="module")
def model() -> Any:
    return exact(tiny_model("qwen3", layers=LAYERS))


@pytest.fixture(scope="module")
def prompts(model: Any) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, model.config.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]


def speedy(model: Any, anchors: Anchors = BOS, **options: Any) -> Engine:
    return make_engine(model, SKIPPED, anchors=anchors, block_tokens=BLOCK, **options)


def asks_of(prompts: list[list[int]], num_tokens: int = 12, outline: PromptOutline = OUTLINE) -> list[Ask]:
    return [
        Ask(prompt, num_tokens, depth, outline=outline) for prompt in prompts for depth in (Depth.SHALLOW, Depth.FULL)
    ]


@pytest.mark.parametrize(("anchors", "outline", "num_anchors", "num_last"), CASES)
def test_it_is_the_slow_reference(
    model: Any, prompts: list[list[int]], anchors: Anchors, outline: PromptOutline, num_anchors: int, num_last: int
):
    for num_skipped in (1, SKIPPED, LAYERS - 1):
        engine = make_engine(model, num_skipped, anchors=anchors)
        expected = [
            list(speed_generate(model, prompt, 12, num_skipped, num_anchors=num_anchors, num_last=num_last).token_ids)
            for prompt in prompts
        ]
        assert run(engine, [Ask(prompt, 12, outline=outline) for prompt in prompts]) == expected


def test_the_deep_layers_miss_the_prompt(model: Any, prompts: list[list[int]]):
    """Else the tests beside this one compared full depth with itself."""
    shallow, full = (logits_after(speedy(model), prompts[-1], depth) for depth in (Depth.SHALLOW, Depth.FULL))
    assert (shallow - full).abs().max() > 1e-3


def test_full_depth_is_the_plain_model(model: Any, prompts: list[list[int]]):
    for prompt in prompts:
        with torch.no_grad():
            plain = model(torch.tensor([prompt])).logits[0, -1]
        assert (logits_after(speedy(model), prompt, Depth.FULL) - plain).abs().max() < 1e-10


@pytest.mark.parametrize("chunk", [1, 2, 4, 7, 16])
def test_chunked_is_unchunked(model: Any, prompts: list[list[int]], chunk: int):
    for anchors in (BOS, Anchors(9)):
        whole, chunked = speedy(model, anchors), speedy(model, anchors, max_step_tokens=chunk)
        for prompt in prompts:
            ours, theirs = (logits_after(engine, prompt, Depth.SHALLOW, OUTLINE) for engine in (chunked, whole))
            assert (ours - theirs).abs().max() < 1e-10


def test_batched_is_one_by_one(model: Any, prompts: list[list[int]]):
    engine = speedy(model, max_step_tokens=24)
    assert run(engine, asks_of(prompts)) == one_by_one(engine, asks_of(prompts))


@pytest.mark.parametrize("anchors", [BOS, Anchors(9)])
@pytest.mark.parametrize("chunk", [3, 512])
def test_two_stages_are_one_and_no_deep_layer_is_shipped(
    model: Any, prompts: list[list[int]], anchors: Anchors, chunk: int
):
    """Decode computes the anchors and the header itself."""
    asks = [Ask(prompt, 10, outline=OUTLINE) for prompt in prompts]
    expected = run(speedy(model, anchors), asks)
    prefill = speedy(model, anchors, stage=Stage.PREFILL, max_step_tokens=chunk)
    num_kept = prefill.runner.decoder.plan.num_kept
    assert all(len(piece.kv) == num_kept for piece in prefill_chunks(prefill, prompts[-1]))
    assert run_handed_off(prefill, speedy(model, anchors, max_step_tokens=chunk), asks) == expected


@pytest.mark.parametrize(("num_blocks", "num_deep_blocks"), [(26, 256), (256, 23), (30, 24)])
def test_preempted_is_unpreempted(model: Any, prompts: list[list[int]], num_blocks: int, num_deep_blocks: int):
    """Whichever of the two kinds of blocks runs out."""
    expected = run(speedy(model), asks_of(prompts, 24))
    tight = speedy(model, num_blocks=num_blocks, num_deep_blocks=num_deep_blocks)
    assert run(tight, asks_of(prompts, 24)) == expected
    assert tight.counts().num_preemptions > 0


def test_preemption_after_a_hand_off_recomputes_the_same(model: Any, prompts: list[list[int]]):
    asks = [Ask(prompt, 24, outline=OUTLINE) for prompt in prompts]
    expected = run(speedy(model), asks)
    tight = speedy(model, num_blocks=26)
    assert run_handed_off(speedy(model, stage=Stage.PREFILL), tight, asks) == expected
    assert tight.counts().num_preemptions > 0


def test_what_the_deep_layers_can_never_hold_is_refused_at_once(model: Any):
    engine = speedy(model, num_deep_blocks=2)
    sampling = SamplingParams(max_tokens=4, temperature=0.0)
    engine.submit_generate("fits", tuple(range(1, 30)), Depth.SHALLOW, sampling)
    with pytest.raises(InvalidRequest, match=r"need 32 tokens of KV, this pool holds 8 in its deep layers"):
        engine.submit_generate("full", tuple(range(1, 30)), Depth.FULL, sampling)
    engine.submit_generate("open", tuple(range(1, 5)), Depth.FULL, replace(sampling, max_tokens=99, may_shorten=True))
    assert engine.scheduler.waiting[-1].sampling.max_tokens == 5


def test_what_decode_computes_itself_leaves_the_hash_and_what_is_shipped_makes_another():
    alike = [LayerPlan(6, 3), LayerPlan(6, 3, 2)], [LayerPlan(6, 3, 1, one) for one in (BOS, Anchors(2))]
    hashes = [{plan.digest(model_digest="m", kv_dtype="float32") for plan in plans} for plans in alike]
    assert [len(found) for found in hashes] == [1, 1] and hashes[0] != hashes[1]


def test_which_tokens_decode_computes_itself_tells_whose_answers_it_goes_on_with():
    plans = [LayerPlan(6, 3, number, one) for number in (1, 2) for one in (None, BOS, Anchors(2), Anchors(system=True))]
    assert len({plan.resume_digest("hash") for plan in plans}) == len(plans)
    assert len({plan.resume_digest(name) for plan in plans for name in ("hash", "other")}) == 2 * len(plans)
    # As replicas of releases say it that knew of nothing else; of a prompt at full depth decode computes nothing anew.
    assert LayerPlan(6, 3).resume_digest("hash") == LayerPlan(6, 0, 2).resume_digest("hash") == "hash"


def test_the_demo_model_has_a_default_plan_of_its_own():
    spec = locate("smollm2").spec()

    def plan(**model: Any) -> LayerPlan:
        return plan_of(load_config(model=model), spec)

    assert plan() == LayerPlan(30, 6)
    assert plan(boundary_tokens=8) == LayerPlan(30, 6, 8)
    assert plan(skip_layers=10) == LayerPlan(30, 10)
    assert plan(plan="speed") == LayerPlan(30, 10, 1, BOS)


def test_deep_layers_with_a_sliding_window_are_refused():
    spec = describe(tiny_model("mistral", layers=LAYERS).config)
    with pytest.raises(ConfigError, match=r"3 of the 3 skipped ones have a sliding window.*--plan pop"):
        plan_of(load_config(model={"skip_layers": SKIPPED, "plan": "speed"}), spec)


def test_deep_layers_that_can_not_hold_the_anchors_are_refused_at_the_start(tmp_path: Path):
    save_tiny(tmp_path, tiny_model("llama", layers=LAYERS))
    model = {"name": str(tmp_path), "skip_layers": SKIPPED, "plan": "speed", "anchors": 60, "boundary_tokens": 5}
    for ratio, is_enough in ((0.25, False), (0.5, True)):
        config = load_config(model=model | {"deep_blocks_ratio": ratio}, decode={"num_blocks": 64, "block_tokens": 4})
        served = Served.of(config)
        weights = load_parameters(served, Stage.DECODE, torch.device("cpu"))
        with nullcontext() if is_enough else pytest.raises(ConfigError, match=r"are 65 tokens at least.*hold 64"):
            engine = build_engine(config, Stage.DECODE, served, weights, device=torch.device("cpu"))
            assert engine.counts().num_deep_blocks == 32
