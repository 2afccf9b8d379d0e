"""Steps by graphs say what steps one by one say, and touch nobody else's K/V.

A graph here is a recording of operations (graphs.py): whatever of a step doesn't flow through its inputs is
missing from the next, as on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import CPU, Ask, make_engine, run, run_choices, watched
from graphs import BrokenGraph, RecordedGraph, compute_as_on_a_gpu
from models import TINY_FAMILIES, WINDOW, save_tiny, tiny_llama, tiny_model

from shoal.backends.gpu import step_graph
from shoal.backends.gpu.step_graph import (
    MAX_GRAPHS,
    Graph,
    StepGraphs,
    StepSize,
    is_wasteful,
    round_context,
    round_rows,
)
from shoal.config import load_config
from shoal.engine import build
from shoal.engine.build import Served, build_engine, load_parameters
from shoal.engine.engine import Engine
from shoal.engine.scheduler import ScheduledRows
from shoal.engine.sequence import Phase, Sequence
from shoal.errors import InternalError
from shoal.model.kv_pool import KvPool
from shoal.model.plan import Anchors
from shoal.wire.messages import Depth, PromptOutline, SamplingParams, Stage

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
def test_a_replay_is_bit_by_bit_what_python_would_run(family: str, monkeypatch: pytest.MonkeyPatch):
    """In float32, of the very same rows, padding included."""
    engine = make_engine(tiny_model(family, torch.float32, layers=4), SKIPPED, new_graph=RecordedGraph)
    compared = []

    def run_both(step: Any, rows: Any, own: Callable[..., None] = step_graph.RecordedStep.run) -> None:
        own(step, rows)
        replayed = step._logits.clone()
        step._forward()
        compared.append(torch.equal(replayed, step._logits))

    monkeypatch.setattr(step_graph.RecordedStep, "run", run_both)
    load_of_many(engine)
    assert len(compared) > 30 and all(compared)


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


def test_the_spare_slot_is_after_all_blocks_of_both_kinds(llama: Any):
    engine = make_engine(llama, SKIPPED, anchors=Anchors(), num_deep_blocks=64, new_graph=RecordedGraph)
    run(engine, [Ask(PROMPT[:40], outline=PromptOutline(0, 2)) for _ in range(3)])
    for index, layer in enumerate(engine.runner.pool.layers):
        num_slots = BLOCK * (256 if index < 2 else 64)
        assert len(layer) == num_slots + 1 and layer[num_slots].any()


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


def test_a_window_longer_than_the_context_is_none(monkeypatch: pytest.MonkeyPatch):
    """Up to it, sizes of both sides, layers read what all others read."""
    for window in (WINDOW, 256, 300, 2000):
        model = tiny_model("mistral", layers=2, sliding_window=window)
        asks = [Ask(PROMPT[:count], 12) for count in (4, 250, 295)]
        assert run(make_engine(model, 1, new_graph=RecordedGraph), asks) == run(make_engine(model, 1), asks)


def test_choices_share_blocks_and_part(llama: Any):
    asks = [Ask(PROMPT[:18], sampling=SamplingParams(max_tokens=9, num_choices=3, seed=4)), Ask(PROMPT[:5])]
    graphed = make_engine(llama, SKIPPED, new_graph=RecordedGraph)
    assert run_choices(graphed, asks) == run_choices(make_engine(llama, SKIPPED), asks)
    assert num_replays(graphed) > 5


def test_who_gave_way_goes_on_the_same(llama: Any):
    asks = [Ask(PROMPT[index : index + 20], 20) for index in range(4)]
    graphed = make_engine(llama, SKIPPED, num_blocks=24, new_graph=RecordedGraph)
    assert run(graphed, asks) == run(make_engine(llama, SKIPPED), asks)
    assert graphed.counts().num_preemptions > 0 and num_replays(graphed) > 5


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


def test_steps_that_have_more_to_them_are_one_by_one(llama: Any):
    engine, taken = make_engine(llama, SKIPPED, new_graph=RecordedGraph), []
    run_step = graphs_of(engine).run

    def noted(rows: Any) -> Any:
        logits = run_step(rows)
        taken.append((all(item.num_rows == 1 for item in rows), logits is not None))
        return logits

    graphs_of(engine).run = noted  # type: ignore[method-assign]
    run(engine, [Ask(PROMPT[:30], 3), Ask(PROMPT[:20], 5)])
    assert taken[0] == (False, False) and set(taken) == {(False, False), (True, True)}


# --- sizes, and what goes wrong -------------------------------------------------------------------------


def test_sizes_are_few_and_little_is_filled_up():
    assert [round_rows(count) for count in (1, 2, 3, 4, 5, 8, 9, 16, 17, 33)] == [1, 2, 4, 4, 8, 8, 16, 16, 24, 40]
    assert [round_context(count) for count in (1, 256, 257, 2048, 2049, 4097)] == [256, 256, 512, 2048, 2560, 5120]
    for count in range(1, 40_000, 7):
        assert count <= round_context(count) <= max(count + 255, count * 5 // 4)
    assert len({round_context(count) for count in range(1, 1 << 17)}) < 40


def test_one_long_sequence_among_short_ones_is_no_step_for_a_graph(llama: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(step_graph, "_LEAST_CONTEXT", 8)
    engine = make_engine(llama, SKIPPED, new_graph=RecordedGraph)
    alike = [Ask(PROMPT[:60], 3), Ask(PROMPT[:50], 3)]
    run(engine, alike)
    assert graphs_of(engine).sizes
    num_before = num_replays(engine)
    run(engine, [Ask(PROMPT[:60], 3), *(Ask(PROMPT[:3], 3) for _ in range(3))])
    assert num_replays(engine) == num_before
    run(engine, alike)
    assert num_replays(engine) > num_before  # it was about those, not for good


@pytest.mark.parametrize(
    ("size", "num_seen", "expected"),
    [
        (StepSize(32, 32_768), 32_000 + 31 * 200, True),
        (StepSize(32, 2560), 32 * 2049, False),
        (StepSize(1, 256), 1, False),
        (StepSize(64, 512), 64, False),
        (StepSize(2, 2048), 2000 + 1, True),
        (StepSize(2, 2048), 2000 + 48, False),
    ],
    ids=str,
)
def test_what_is_read_in_vain_has_a_limit(size: StepSize, num_seen: int, expected: bool):
    assert is_wasteful(size, num_seen) is expected


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


def test_a_size_without_room_is_run_one_by_one_and_others_are_captured(llama: Any, caplog: pytest.LogCaptureFixture):
    class TooLarge(BrokenGraph):
        def capture(self, run: Callable[[], None]) -> None:
            raise torch.OutOfMemoryError("no memory for this")

    graphs: list[Graph] = [RecordedGraph(), TooLarge()]
    engine, plain = make_engine(llama, SKIPPED, new_graph=graphs.pop), make_engine(llama, SKIPPED)
    asks = [Ask(PROMPT[:5], 8), Ask(PROMPT[:7], 12), Ask(PROMPT[:9], 8)]
    for some in (asks, asks, asks[:1]):
        assert run(engine, some) == run(plain, some)
    assert graphs == [] and graphs_of(engine).sizes == [StepSize(1, 256)]
    assert len([record for record in caplog.records if "no graph of StepSize(rows=4" in record.message]) == 1


def test_what_was_captured_before_goes_on(llama: Any):
    graphs: list[Graph] = [BrokenGraph(), RecordedGraph()]
    engine = make_engine(llama, SKIPPED, new_graph=graphs.pop)
    run(engine, [Ask(PROMPT[:5], 8)])
    before = num_replays(engine)
    run(engine, [Ask(PROMPT[:5], 8), Ask(PROMPT[:5], 12)])
    assert num_replays(engine) > before and graphs == []
    assert graphs_of(engine).sizes == [StepSize(1, 256)]


def test_a_pool_without_a_spare_slot_is_refused(llama: Any):
    engine = make_engine(llama, SKIPPED)
    with pytest.raises(InternalError, match="spare slot"):
        StepGraphs(engine.runner.decoder, engine.runner.pool, RecordedGraph, 4)


def test_a_step_tells_that_it_goes_on(llama: Any):
    engine, beats = make_engine(llama, SKIPPED, new_graph=RecordedGraph), []
    run(engine, [Ask(PROMPT[:5])])
    engine.told_of_progress(lambda: beats.append(num_replays(engine)))
    before = num_replays(engine)
    run(engine, [Ask(PROMPT[:5], 4)])
    assert {before + 1, before + 2, before + 3} <= set(beats)  # after each replay, while the device computes


@pytest.mark.parametrize("stage", Stage)
def test_decode_on_cuda_has_them_and_its_warm_up_captures_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Stage
):
    """On a GPU that is a CPU: what is CUDA's is stood in for."""
    save_tiny(tmp_path)
    limits = {"num_blocks": 16, "max_step_tokens": 64, "max_sequences": 3}
    config = load_config(model={"name": str(tmp_path), "dtype": "float32"}, decode=limits, prefill=limits)
    served = Served.of(config)
    parameters = load_parameters(served, stage, CPU)
    monkeypatch.setattr(build, "CudaGraphs", lambda device: RecordedGraph)
    monkeypatch.setattr(build, "prepare_attention", lambda device: None)
    monkeypatch.setattr(build, "KvPool", lambda *given, device, **options: KvPool(*given, device=CPU, **options))
    plain, graphed = (
        build_engine(config, stage, served, parameters, device=torch.device(kind)) for kind in ("cpu", "cuda")
    )
    assert plain.runner.decode_path is None and not plain.runner.pool.has_spare_slot
    if stage is Stage.PREFILL:
        assert graphed.runner.decode_path is None
        return
    assert graphs_of(graphed).sizes == [StepSize(1, 256)]
    asks = [Ask(PROMPT[:count], 4) for count in (3, 5, 7)]
    assert run(graphed, asks) == run(plain, asks)
    assert graphs_of(graphed).sizes[-1] == StepSize(3, 256)
