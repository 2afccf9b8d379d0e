"""A prompt's own log-probabilities: what transformers computes, each told once, in whatever steps it is run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from engines import assert_nothing_held, exact, make_engine
from models import tiny_model

from shoal.engine import runner
from shoal.engine.engine import Engine
from shoal.engine.events import PromptEvent
from shoal.engine.logprobs import ScoredToken, score
from shoal.errors import InternalError
from shoal.model.families import FAMILIES
from shoal.wire.messages import Depth, FinishReason, SamplingParams

LAYERS, SKIPPED, NUM_TOP = 4, 2, 3
LENGTHS = (1, 2, 3, 16, 17, 40)
SCORED = SamplingParams(max_tokens=3, temperature=0.0, num_prompt_logprobs=NUM_TOP)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return exact(tiny_model(request.param, layers=LAYERS))


@pytest.fixture(scope="module")
def llama() -> Any:
    return exact(tiny_model("llama", layers=LAYERS))


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(1, 97, (n,), generator=generator).tolist()) for n in lengths]


def events_of(engine: Engine, asks: list[tuple[tuple[int, ...], SamplingParams]]) -> dict[str, list[PromptEvent]]:
    """Run all at once; what was told of each prompt, by its place in ``asks``."""
    told: dict[str, list[PromptEvent]] = {str(index): [] for index in range(len(asks))}
    for index, (prompt, sampling) in enumerate(asks):
        engine.submit_generate(str(index), prompt, Depth.FULL, sampling)
    while not (output := engine.step()).is_idle:
        assert not output.failures
        for event in output.prompts:
            told[event.request_id].append(event)
    assert_nothing_held(engine)
    return told


def scores_of(engine: Engine, asked: list[tuple[int, ...]], sampling: SamplingParams = SCORED) -> list[Any]:
    told = events_of(engine, [(prompt, sampling) for prompt in asked])
    return [[token for event in events for token in event.scores] for events in told.values()]


def assert_is_log_softmax(model: Any, prompt: tuple[int, ...], scores: list[ScoredToken]) -> None:
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(dim=-1)
    assert [one.token_id for one in scores] == list(prompt[1:])
    for row, one in zip(expected, scores, strict=False):
        assert one.logprob == pytest.approx(float(row[one.token_id]), abs=1e-10)
        best = row.topk(NUM_TOP)
        assert [token_id for token_id, _ in one.top] == best.indices.tolist()
        assert [logprob for _, logprob in one.top] == pytest.approx(best.values.tolist(), abs=1e-10)


def test_they_are_transformers_log_softmax_for_every_family(model: Any):
    for prompt, scores in zip(prompts(), scores_of(make_engine(model, SKIPPED), prompts()), strict=True):
        assert_is_log_softmax(model, prompt, scores)


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_chunked_is_unchunked_and_told_chunk_by_chunk(llama: Any, chunk: int):
    [prompt] = prompts((40,))
    told = events_of(make_engine(llama, SKIPPED, max_step_tokens=chunk), [(prompt, SCORED)])["0"]
    assert [len(event.scores) for event in told[:-1]] == [chunk] * (len(told) - 1)
    assert len(told) == -(-39 // chunk)
    assert_is_log_softmax(llama, prompt, [token for event in told for token in event.scores])


def test_more_rows_than_may_be_logits_at_once_change_nothing(llama: Any, monkeypatch: pytest.MonkeyPatch):
    """Seven rows at a time, over the borders of prompts."""
    shapes = []

    def seen(logits: torch.Tensor, *args: Any) -> Any:
        shapes.append(logits.shape[0])
        return score(logits, *args)

    monkeypatch.setattr(runner, "MAX_LOGIT_ROWS", 7)
    monkeypatch.setattr(runner, "score", seen)
    for prompt, scores in zip(prompts(), scores_of(make_engine(llama, SKIPPED), prompts()), strict=True):
        assert_is_log_softmax(llama, prompt, scores)
    assert max(shapes) == 7 and sum(shapes) == sum(length - 1 for length in LENGTHS)


def test_each_request_of_a_step_has_as_many_alternatives_as_it_asked_for(llama: Any):
    counts = (None, 0, 1, 5, 97, 200)
    [prompt] = prompts((9,))
    asks = [(prompt, replace(SCORED, num_prompt_logprobs=num)) for num in counts]
    told = events_of(make_engine(llama, SKIPPED), asks)
    assert told["0"] == []
    for index, num in enumerate(counts[1:], start=1):
        [event] = told[str(index)]
        assert {len(one.top) for one in event.scores} == {min(num or 0, 97)}


@pytest.mark.parametrize("chunk", [4, 512])
def test_preempted_midway_each_is_told_once_and_the_same(llama: Any, chunk: int):
    """The pool holds little more than one prompt with its answer, so the younger ones give way again and again."""
    asked = prompts((17, 21, 24))
    params = replace(SCORED, max_tokens=24)
    engine = make_engine(llama, SKIPPED, num_blocks=14, max_step_tokens=chunk)
    for prompt, scores in zip(asked, scores_of(engine, asked, params), strict=True):
        assert_is_log_softmax(llama, prompt, scores)
    assert engine.counts().num_preemptions > 0


@pytest.mark.parametrize(("num_choices", "num_prompt_logprobs"), [(1, NUM_TOP), (3, NUM_TOP), (1, None)])
@pytest.mark.parametrize("length", [1, 2, 24])
def test_with_nothing_to_sample_the_prompt_ends_the_request(
    llama: Any, length: int, num_choices: int, num_prompt_logprobs: int | None
):
    [prompt] = prompts((length,))
    sampling = replace(SCORED, max_tokens=0, num_choices=num_choices, num_prompt_logprobs=num_prompt_logprobs)
    told = events_of(make_engine(llama, SKIPPED, max_step_tokens=5), [(prompt, sampling)])["0"]
    assert [event.finish_reason for event in told] == [None] * (len(told) - 1) + [FinishReason.LENGTH]
    if num_prompt_logprobs is not None:
        assert_is_log_softmax(llama, prompt, [token for event in told for token in event.scores])


@pytest.mark.parametrize(("depth", "hold"), [(Depth.SHALLOW, False), (Depth.FULL, True)])
def test_a_prompt_that_is_shallow_or_comes_from_elsewhere_has_none(llama: Any, depth: Depth, hold: bool):
    engine = make_engine(llama, SKIPPED)
    with pytest.raises(InternalError, match="full depth"):
        engine.submit_generate("a", (3, 4, 5), depth, SCORED, hold=hold)


def test_states_that_are_no_numbers_end_their_own_request_alone(llama: Any, monkeypatch: pytest.MonkeyPatch):
    engine = make_engine(llama, 0)
    for name in "ab":
        engine.submit_generate(name, (3, 4, 5), Depth.FULL, SCORED)

    def spoiled(logits: torch.Tensor, *args: Any) -> Any:
        return score(logits.index_fill(0, torch.tensor([1]), torch.nan), *args)

    with monkeypatch.context() as patched:
        patched.setattr(runner, "score", spoiled)
        output = engine.step()
    assert [failure.request_id for failure in output.failures] == ["a"]
    assert [event.request_id for event in output.prompts] == ["b"]
    assert [token.request_id for token in output.tokens] == ["b"]
    while not engine.step().is_idle:
        pass
    assert_nothing_held(engine)


# --- numbers --------------------------------------------------------------------------------------------


def test_of_equals_the_lower_ids_come_first():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    first, second = score(logits, [0, 4], [2, 3])
    assert [token_id for token_id, _ in first.top] == [1, 3]
    assert [token_id for token_id, _ in second.top] == [0, 1, 2]


def test_the_impossible_is_minus_infinity_and_no_number_is_broken():
    logits = torch.tensor([[0.0, -torch.inf], [torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf, -torch.inf]])
    possible, *broken = score(logits, [1, 1, 1, 1], [1] * 4)
    assert possible == ScoredToken(1, -torch.inf, ((0, 0.0),))
    assert all(one.is_broken for one in broken) and not possible.is_broken
