"""An answer of which some was sent goes on in another engine as it would have gone on in the first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from engines import Ask, assert_nothing_held, make_engine, run_choices
from models import tiny_llama

from shoal.engine.engine import Engine
from shoal.engine.tables import Reuse
from shoal.model.plan import Anchors
from shoal.wire.messages import Depth, SamplingParams, SentChoice

SKIPPED = 3
PROMPT = [5, 17, 40, 3, 88, 22, 9, 61, 30, 12, 77, 45, 6]
GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
SEEDED = replace(GREEDY, temperature=1.5, seed=11, num_choices=3)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(torch.float32)[1]


def sent_of(choices: list[list[int]], *numbers: int) -> tuple[SentChoice, ...]:
    """The first so many tokens of each choice."""
    return tuple(
        SentChoice(tuple(tokens[:number]), is_complete=number == len(tokens))
        for tokens, number in zip(choices, numbers, strict=True)
    )


def resume(engine: Engine, ask: Ask, sent: tuple[SentChoice, ...], *others: Ask, hold: bool = False) -> list[list[int]]:
    """Each choice's tokens, those that were sent included, with ``others`` beside it."""
    choices = [list(one.token_ids) for one in sent]
    engine.submit_generate("resumed", tuple(ask.prompt), ask.depth, ask.params, hold=hold, sent=sent)
    for index, other in enumerate(others):
        engine.submit_generate(str(index), tuple(other.prompt), other.depth, other.params)
    while not (output := engine.step()).is_idle:
        for failure in output.failures:
            raise failure.error
        for reservation in output.reserved:
            engine.start(reservation.request_id)
        for event in output.tokens:
            if event.request_id == "resumed":
                assert event.index == len(choices[event.choice])
                choices[event.choice].append(event.token_id)
    assert_nothing_held(engine)
    return choices


def test_what_is_first_is_what_this_engine_says_first(model: Any):
    """Of each choice: whoever reads an answer that another engine began has waited for it."""
    [whole] = run_choices(make_engine(model, SKIPPED), [Ask(PROMPT, sampling=SEEDED)])
    engine = make_engine(model, SKIPPED)
    engine.submit_generate("resumed", tuple(PROMPT), Depth.SHALLOW, SEEDED, sent=sent_of(whole, 4, 0, 7))
    first: dict[int, list[int]] = {0: [], 1: [], 2: []}
    while not (output := engine.step()).is_idle:
        for event in output.tokens:
            if event.is_first:
                first[event.choice].append(event.index)
    assert first == {0: [4], 1: [0], 2: [7]}


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("anchors", [None, Anchors(2)], ids=["pop", "speed"])
@pytest.mark.parametrize("depth", [Depth.SHALLOW, Depth.FULL])
@pytest.mark.parametrize("sampling", [GREEDY, replace(SEEDED, num_choices=1)], ids=["greedy", "seeded"])
def test_wherever_it_is_cut(model: Any, sampling: SamplingParams, depth: Depth, anchors: Anchors | None, hold: bool):
    ask = Ask(PROMPT, depth=depth, sampling=sampling)
    engine = make_engine(model, SKIPPED, anchors=anchors, max_step_tokens=8)
    [whole] = run_choices(engine, [ask])
    for number in range(len(whole[0])):
        assert resume(engine, ask, sent_of(whole, number), hold=hold) == whole


@pytest.mark.parametrize("anchors", [None, Anchors(2)], ids=["pop", "speed"])
@pytest.mark.parametrize("numbers", [(0, 0, 0), (1, 0, 4), (3, 3, 3), (10, 2, 10), (10, 0, 7), (0, 10, 0)], ids=str)
def test_several_choices_each_from_where_it_was(model: Any, numbers: tuple[int, ...], anchors: Anchors | None):
    ask = Ask(PROMPT, sampling=SEEDED)
    engine = make_engine(model, SKIPPED, anchors=anchors, max_step_tokens=8)
    [whole] = run_choices(engine, [ask])
    assert len({tuple(choice) for choice in whole}) == 3
    assert resume(engine, ask, sent_of(whole, *numbers)) == whole


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["one", "several"])
def test_where_blocks_are_short_it_gives_way_and_comes_back(model: Any, sampling: SamplingParams):
    ask = Ask(PROMPT, sampling=sampling)
    [whole] = run_choices(make_engine(model, SKIPPED), [ask])
    engine = make_engine(model, SKIPPED, num_blocks=12)
    others = [Ask(PROMPT[:length], sampling=replace(GREEDY, max_tokens=20)) for length in (5, 7, 9)]
    assert resume(engine, ask, sent_of(whole, *(4,) * len(whole)), *others) == whole
    assert engine.counts().num_preemptions > 0


def test_it_takes_what_is_remembered(model: Any):
    """The prompt and some of the answer were computed here for somebody else."""
    ask = Ask(PROMPT, sampling=GREEDY)
    engine = make_engine(model, SKIPPED, reuse=Reuse.EXACT)
    [whole] = run_choices(engine, [ask])
    assert resume(engine, ask, sent_of(whole, 8)) == whole
    engine.submit_generate("resumed", tuple(PROMPT), ask.depth, GREEDY, sent=sent_of(whole, 8))
    engine.step()
    [resumed] = engine.scheduler.running
    assert resumed.num_present > len(PROMPT)
    engine.finish("resumed")


@pytest.mark.parametrize(("num_sent", "num_in_all"), [(2, 8), (7, 8)])
def test_an_answer_that_may_be_shortened_ends_where_the_pool_does(model: Any, num_sent: int, num_in_all: int):
    engine = make_engine(model, SKIPPED, num_blocks=5)  # 20 tokens, and the last one needs no room
    ask = Ask(PROMPT, sampling=replace(GREEDY, max_tokens=100, may_shorten=True))
    [whole] = run_choices(engine, [ask])
    assert resume(engine, ask, sent_of(whole, num_sent)) == whole and len(whole[0]) == num_in_all
