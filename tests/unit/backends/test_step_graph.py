"""Steps by graphs say what steps one by one say, and touch nobody else's K/V.

A graph here is a recording of operations (graphs.py): whatever of a step doesn't flow through its inputs is
missing from the next, as on a GPU.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from engines import Ask, make_engine, run, watched
from graphs import BrokenGraph, RecordedGraph, compute_as_on_a_gpu
from models import TINY_FAMILIES, tiny_llama, tiny_model

from shoal.backends.gpu import step_graph
from shoal.backends.gpu.step_graph import (
    MAX_GRAPHS,
    StepGraphs,
)
from shoal.engine.engine import Engine
from shoal.engine.scheduler import ScheduledRows
from shoal.engine.sequence import Phase, Sequence
from shoal.errors import InternalError
from shoal.model.plan import Anchors
from shoal.wire.messages import Depth, PromptOutline, SamplingParams

SKIPPED, BLOCK = 2, 4
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
PROMPT = [3 + index * 7 % 90 for index in range(400)]


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_as_on_a_gpu(monkeypatch)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama(torch.float64, layers=4)[1]


def graphs_of(engine: Engine) -> StepGraphs:
    assert isinstance(engine.runner.decode_path, StepGraphs)
    return engine.runner.decode_path


def num_replays(engine: Engine) -> int:
    return sum(step._graph.num_replays for step in graphs_of(engine)._steps.values())


def load_of_many(engine: Engine) -> list[tuple[str, int]]:
    """Sequences that join and leave, of both depths, some beyond the least context; the tokens in their order."""
    said: list[tuple[str, int]] = []
    for step in range(200):
        if step % 3 == 0 and step < 45:
            index = step // 3
            depth = Depth.SHALLOW if index % 2 else Depth.FULL
            prompt, sampling = tuple(PROMPT[: 1 + index * 61 % 290]), replace(GREEDY, max_tokens=4 + index * 5 % 17)
            engine.submit_generate(str(index), prompt, depth, sampling)
        output = engine.step()
        assert not output.failures
        said += [(event.request_id, event.token_id) for event in output.tokens]
        if step >= 45 and output.is_idle:
            return said
    raise AssertionError("it never ends")


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("num_skipped", [0, SKIPPED])
def test_the_same_as_one_by_one(family: str, num_skipped: int):
    model = tiny_model(family, layers=4)
    expected, found = list[torch.Tensor](), list[torch.Tensor]()
    eager = watched(make_engine(model, num_skipped), expected)
    graphed = watched(make_engine(model, num_skipped, new_graph=RecordedGraph), found)
    assert load_of_many(graphed) == load_of_many(eager)
    assert all(torch.allclose(ours, theirs, rtol=0, atol=1e-12) for ours, theirs in zip(found, expected, strict=True))
    assert num_replays(graphed) > 30
    sizes = graphs_of(graphed).sizes
    assert len({size.rows for size in sizes}) > 1 and len({size.context for size in sizes}) > 1
    for ours, theirs in zip(graphed.runner.pool.layers, eager.runner.pool.layers, strict=True):
        assert torch.allclose(ours[:-1], theirs, rtol=0, atol=1e-12)  # all but the spare slot: nobody wrote elsewhere


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_padding_reads_and_writes_nobodys_slots(family: str):
    """What isn't a sequence's is no number from the beginning: it would spread if it were read."""
    engine = make_engine(tiny_model(family, layers=4), SKIPPED, block_tokens=BLOCK, new_graph=RecordedGraph)
    pool = engine.runner.pool
    for index, num_tokens in enumerate((5, 14, 30)):
        engine.submit_generate(str(index), tuple(PROMPT[:num_tokens]), Depth.FULL, GREEDY)
    engine.submit_generate("waits", tuple(PROMPT[:9]), Depth.FULL, GREEDY, hold=True)
    while not engine.step().reserved:
        pass
    for layer in pool.layers:
        layer[:-1] = torch.nan
    owned: set[int] = set()
    run_step = engine.runner.run

    def noted(plan: Any) -> Any:
        for item in plan.rows:
            owned.update(pool.layout.slots(item.sequence.blocks, item.start, item.end).tolist())
        return run_step(plan)

    engine.runner.run = noted  # type: ignore[method-assign]
    while not (output := engine.step()).is_idle:
        assert not output.failures
    assert num_replays(engine) == GREEDY.max_tokens - 1
    assert owned and len(owned) < pool.num_blocks * BLOCK
    for layer in pool.layers:
        written = layer[:-1].isfinite().all(dim=(1, 2, 3)).nonzero().squeeze(1).tolist()
        assert set(written) == owned
        assert layer[-1].isfinite().all() and layer[-1].any()  # the fourth row's


@pytest.mark.parametrize("anchors", [Anchors(), Anchors(5)])
def test_deep_layers_with_blocks_of_their_own(llama: Any, anchors: Anchors):
    lengths = (1, 7, 30, 290, 64)
    asks = [
        Ask(PROMPT[:count], 9, depth, outline=PromptOutline(0, 2))
        for count in lengths
        for depth in (Depth.SHALLOW, Depth.FULL)
    ]
    expected, found = list[torch.Tensor](), list[torch.Tensor]()
    eager = watched(make_engine(llama, SKIPPED, anchors=anchors), expected)
    graphed = watched(make_engine(llama, SKIPPED, anchors=anchors, new_graph=RecordedGraph), found)
    assert run(graphed, asks[::2]) == run(eager, asks[::2])
    assert graphs_of(graphed).sizes[-1].context > graphs_of(graphed).sizes[-1].deep_context > 0
    assert run(graphed, asks) == run(eager, asks)
    assert all(torch.allclose(ours, theirs, rtol=0, atol=1e-12) for ours, theirs in zip(found, expected, strict=True))
    assert num_replays(graphed) > 8


# --- which steps ----------------------------------------------------------------------------------------


def rows_of(start: int, end: int, **options: Any) -> ScheduledRows:
    """Of a prompt of ten tokens, all but the last shallow."""
    values = {"prompt": tuple(range(10)), "shallow": range(9), "sampling": GREEDY, "phase": Phase.RUNNING, **options}
    return ScheduledRows(Sequence("rows", **values), start, end)


def test_only_steps_of_single_tokens_that_are_continued_at_full_depth(llama: Any):
    takes = graphs_of(make_engine(llama, SKIPPED, new_graph=RecordedGraph, max_sequences=5)).takes
    single = rows_of(9, 10)
    assert takes([single]) and takes([single] * 5)
    assert takes([rows_of(11, 12, output=[4, 5])])
    others = {
        "nothing": [],
        "more than there may be": [single] * 6,
        "a prompt": [rows_of(0, 10)],
        "a prompt beside": [single, rows_of(4, 10)],
        "the first token of a prompt": [rows_of(0, 1)],
        "a shallow one, though it were continued": [rows_of(9, 10, shallow=range(10))],
        "a recomputed one": [rows_of(10, 11, output=[4, 5])],
        "what is shipped": [rows_of(8, 9, sampled=False)],
        "nothing wanted": [rows_of(9, 10, sampling=replace(GREEDY, max_tokens=0))],
        "the prompt's own to be told": [rows_of(8, 9, sampling=replace(GREEDY, num_prompt_logprobs=2))],
    }
    assert {name for name, rows in others.items() if takes(rows)} == set()


# --- sizes, and what goes wrong -------------------------------------------------------------------------


def test_a_size_is_captured_once_and_the_oldest_goes(llama: Any, monkeypatch: pytest.MonkeyPatch):
    made: list[RecordedGraph] = []

    def new_graph() -> RecordedGraph:
        made.append(RecordedGraph())
        return made[-1]

    def ask(*counts: int) -> None:
        run(engine, [Ask(PROMPT[:5], count) for count in counts])

    engine = make_engine(llama, SKIPPED, new_graph=new_graph)
    graphs = graphs_of(engine)
    monkeypatch.setattr(step_graph, "MAX_GRAPHS", 2)
    ask(4)
    ask(6)
    assert len(made) == 1
    ask(6, 4)
    assert [size.rows for size in graphs.sizes] == [2, 1] and len(made) == 2
    ask(6, 4, 4, 4, 4)
    assert [size.rows for size in graphs.sizes] == [8, 1] and len(made) == 3
    ask(5, 5)
    assert len(graphs.sizes) == 2 and len(made) == 4
    assert MAX_GRAPHS < 100


def test_what_cannot_be_captured_is_run_one_by_one_and_said_once(llama: Any, caplog: pytest.LogCaptureFixture):
    asks = [Ask(PROMPT[:count], 3 + count) for count in (3, 8, 12)]
    engine = make_engine(llama, SKIPPED, new_graph=BrokenGraph)
    with caplog.at_level(logging.WARNING):
        assert run(engine, asks) == run(make_engine(llama, SKIPPED), asks)
    [record] = caplog.records
    assert "one by one: no memory for this" in record.getMessage()
    assert graphs_of(engine).sizes == []


def test_a_pool_without_a_spare_slot_is_refused(llama: Any):
    engine = make_engine(llama, SKIPPED)
    with pytest.raises(InternalError, match="spare slot"):
        StepGraphs(engine.runner.decoder, engine.runner.pool, RecordedGraph, 4)
