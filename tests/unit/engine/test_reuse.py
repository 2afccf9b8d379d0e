"""Prompts that begin alike share K/V, and nobody can tell from an answer: float64, tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import Ask, assert_nothing_held, exact, logits_after, make_engine, run, run_handed_off
from models import tiny_model
from reference import all_layers, encode_shallow, logits_of, pop_generate, run_layers

from shoal.engine.engine import Engine
from shoal.engine.tables import Reuse
from shoal.model.plan import Anchors
from shoal.wire.messages import Depth, SamplingParams, Stage

NUM_SKIPPED, BLOCK = 2, 4
PROMPT = [3 + index * 7 % 90 for index in range(30)]


@pytest.fixture(scope="module")
def model() -> Any:
    return exact(tiny_model("llama"))


def engine_of(model: Any, reuse: Reuse = Reuse.EXACT, **options: Any) -> Engine:
    return make_engine(model, NUM_SKIPPED, block_tokens=BLOCK, reuse=reuse, **options)


def num_present(engine: Engine, ask: Ask) -> int:
    """How many of the prompt's tokens are there already."""
    engine.submit_generate("look", tuple(ask.prompt), ask.depth, ask.params, hold=True, tenant=ask.tenant)
    [reservation] = engine.step().reserved
    engine.finish("look")
    return reservation.num_present


def test_the_same_prompt_again_is_there_but_for_the_last_block(model: Any):
    engine, ask = engine_of(model), Ask(PROMPT)
    first = run(engine, [ask])
    assert num_present(engine, ask) == 28
    assert run(engine, [ask]) == first == [list(pop_generate(model, PROMPT, 8, NUM_SKIPPED).token_ids)]


@pytest.mark.parametrize("max_step_tokens", [512, 5])
def test_logits_are_those_of_a_prompt_that_found_nothing(model: Any, max_step_tokens: int):
    engine = engine_of(model, max_step_tokens=max_step_tokens)
    run(engine, [Ask(PROMPT[:17] + [5] * 9)])
    assert num_present(engine, Ask(PROMPT)) == 16
    fresh = logits_after(engine_of(model, Reuse.NONE), PROMPT, Depth.SHALLOW)
    torch.testing.assert_close(logits_after(engine, PROMPT, Depth.SHALLOW), fresh)


@pytest.mark.parametrize("reuse", [Reuse.EXACT, Reuse.ANY])
def test_of_two_that_are_let_in_together_the_second_finds_what_the_first_has_computed(model: Any, reuse: Reuse):
    asks = [Ask(PROMPT), Ask([*PROMPT[:22], 5, 6, 7]), Ask([*PROMPT[:10], 5, 6, 7], depth=Depth.FULL)]
    plain = [run(engine_of(model, Reuse.NONE), [ask])[0] for ask in asks]
    engine = engine_of(model, reuse, max_step_tokens=len(PROMPT))
    present: dict[str, int] = {}
    tokens: dict[str, list[int]] = {}
    for index, ask in enumerate(asks):
        engine.submit_generate(str(index), tuple(ask.prompt), ask.depth, ask.params)
    while not (output := engine.step()).is_idle:
        for event in output.tokens:
            present.setdefault(event.request_id, event.num_present)
            tokens.setdefault(event.request_id, []).append(event.token_id)
    assert list(tokens.values()) == plain and present == {"0": 0, "1": 20, "2": 0}
    assert_nothing_held(engine)


def test_what_came_from_prefill_stays_though_others_have_computed_the_same(model: Any):
    engine, params = engine_of(model), SamplingParams(max_tokens=4, temperature=0.0)
    engine.submit_generate("arrived", tuple(PROMPT), Depth.SHALLOW, params, hold=True)
    blocks = list(engine.step().reserved[0].blocks)
    run_beside(engine, Ask(PROMPT))
    engine.start("arrived", num_arrived=len(PROMPT) - 1)
    engine.step()
    [sequence] = engine._sequences["arrived"].values()
    assert sequence.num_present == 0 and sequence.blocks[: len(blocks)] == blocks
    engine.finish("arrived")
    assert_nothing_held(engine)


def run_beside(engine: Engine, ask: Ask) -> None:
    """Run one to its end while others are held."""
    engine.submit_generate("beside", tuple(ask.prompt), ask.depth, ask.params)
    while "beside" in engine._sequences:
        assert not engine.step().failures


def test_depths_do_not_mix(model: Any):
    engine = engine_of(model)
    run(engine, [Ask(PROMPT)])
    assert num_present(engine, Ask(PROMPT, depth=Depth.FULL)) == 0
    run(engine, [Ask(PROMPT, depth=Depth.FULL)])
    assert num_present(engine, Ask(PROMPT, depth=Depth.FULL)) == 28
    full = logits_after(engine_of(model, Reuse.NONE), PROMPT, Depth.FULL)
    torch.testing.assert_close(logits_after(engine, PROMPT, Depth.FULL), full)
    shallow = logits_after(engine_of(model, Reuse.NONE), PROMPT, Depth.SHALLOW)
    torch.testing.assert_close(logits_after(engine, PROMPT, Depth.SHALLOW), shallow)


def test_a_tenant_finds_nothing_of_another(model: Any):
    engine = engine_of(model)
    run(engine, [Ask(PROMPT, tenant="a")])
    assert num_present(engine, Ask(PROMPT, tenant="b")) == 0


def test_log_probabilities_of_a_prompt_take_no_hits(model: Any):
    engine = engine_of(model)
    params = SamplingParams(max_tokens=1, temperature=0.0, num_prompt_logprobs=0)
    run(engine, [Ask(PROMPT, depth=Depth.FULL)])
    engine.submit_generate("scored", tuple(PROMPT), Depth.FULL, params)
    output = engine.step()
    assert len(output.prompts[0].scores) == len(PROMPT) - 1
    assert output.tokens[0].num_present == 0


def second_turn(model: Any, reuse: Reuse) -> tuple[Engine, list[int], list[int]]:
    """An engine that has answered, the next turn's prompt, and the answer."""
    engine = engine_of(model, reuse)
    [answer] = run(engine, [Ask(PROMPT, num_tokens=15)])
    return engine, [*PROMPT, *answer, 7, 8, 9, 10, 11], answer


def test_the_next_turn_finds_what_was_shallow_in_this_one(model: Any):
    engine, prompt, _ = second_turn(model, Reuse.EXACT)
    assert num_present(engine, Ask(prompt)) == 28  # the boundary token, own then, would be shallow now
    expected = logits_after(engine_of(model, Reuse.NONE), prompt, Depth.SHALLOW)
    torch.testing.assert_close(logits_after(engine, prompt, Depth.SHALLOW), expected)


def test_of_an_earlier_answer_the_next_turn_may_keep_the_true_kv(model: Any):
    engine, prompt, _ = second_turn(model, Reuse.ANY)
    present = 44  # blocks of the 44 tokens that were run: the answer's last one never was
    assert num_present(engine, Ask(prompt)) == present
    cache: Any = {}
    encode_shallow(model, prompt[:29], NUM_SKIPPED, cache)
    run_layers(model, prompt[29:present], 29, all_layers(model), cache)
    encode_shallow(model, prompt[present:-1], NUM_SKIPPED, cache, start=present)
    states = run_layers(model, prompt[-1:], len(prompt) - 1, all_layers(model), cache)
    ours = logits_after(engine, prompt, Depth.SHALLOW)
    torch.testing.assert_close(ours, logits_of(model, states)[0])
    plain = logits_after(engine_of(model, Reuse.NONE), prompt, Depth.SHALLOW)
    assert not torch.allclose(ours, plain), "else there would be nothing to tell apart"


def test_a_small_pool_gives_remembered_blocks_to_whom_needs_them(model: Any):
    asks = [Ask([*PROMPT[: 12 + index], index + 3, 4], num_tokens=12) for index in range(12)]
    expected = [run(engine_of(model, Reuse.NONE), [ask])[0] for ask in asks]
    engine = engine_of(model, num_blocks=24)
    for _ in range(2):
        assert run(engine, asks) == expected
    assert engine.scheduler.num_preemptions > 0


def test_after_a_hand_off_only_what_is_missing_is_shipped(model: Any):
    prefill = make_engine(model, NUM_SKIPPED, stage=Stage.PREFILL, block_tokens=BLOCK)
    decode = engine_of(model)
    first, second = Ask(PROMPT), Ask([*PROMPT[:22], 5, 6, 7])
    plain = [run(engine_of(model, Reuse.NONE), [ask])[0] for ask in (first, second)]
    assert run_handed_off(prefill, decode, [first]) == plain[:1]
    assert num_present(decode, second) == 20
    assert run_handed_off(prefill, decode, [second]) == plain[1:]
    assert run(decode, [first]) == plain[:1]


def test_a_sequence_that_failed_is_not_found(model: Any):
    engine, ask = engine_of(model), Ask(PROMPT, num_tokens=20)
    engine.submit_generate("broken", tuple(PROMPT), Depth.SHALLOW, ask.params)
    engine.step()
    assert num_present(engine, ask) == 28
    pool = engine.runner.pool
    blocks = engine._sequences["broken"][0].blocks
    pool.layers[0][blocks[0] * BLOCK] = torch.nan
    [failure] = engine.step().failures
    assert failure.request_id == "broken"
    assert num_present(engine, ask) == 0
    assert_nothing_held(engine)


def test_what_failed_is_not_found_by_way_of_others_that_hold_it(model: Any):
    """Another request took the same beginning before it failed, and ends well: it doesn't bring it back."""
    engine, ask = engine_of(model), Ask(PROMPT, num_tokens=20)
    engine.submit_generate("broken", tuple(PROMPT), Depth.SHALLOW, ask.params)
    engine.step()
    engine.submit_generate("other", (*PROMPT[:20], 5, 6, 7), Depth.SHALLOW, ask.params, hold=True)
    engine.step()
    broken = engine._sequences["broken"][0]
    engine._fail(broken, RuntimeError("a defect"))
    engine.start("other")
    while not engine.step().is_idle:
        pass
    assert num_present(engine, ask) == 0
    assert_nothing_held(engine)
    run(engine, [ask])
    assert num_present(engine, ask) == 28, "blocks that were given back are as good as any"


def test_where_deep_layers_hold_other_tokens_nothing_is_reused(model: Any):
    engine = engine_of(model, anchors=Anchors())
    run(engine, [Ask(PROMPT)])
    assert num_present(engine, Ask(PROMPT)) == 0
