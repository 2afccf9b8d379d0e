"""Steps that only decode, in one call: they bring what any other step brings, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engines import (
    Ask,
    kernel_model,
    make_engine,
    native_kernels,
    parameters_of,
    run_choices,
    torch_threads,
)
from models import tiny_model

from shoal.backends.cpu.kernels import NativeKernels
from shoal.backends.cpu.native_steps import NativeSteps
from shoal.engine.engine import Engine
from shoal.engine.scheduler import ScheduledRows
from shoal.engine.sequence import Sequence
from shoal.errors import InternalError
from shoal.model import rope
from shoal.model.int8 import Int8Matrix
from shoal.wire.messages import Depth, SamplingParams

PROMPT = tuple(3 + index * 7 % 90 for index in range(150))


@pytest.fixture(scope="module")
def kernels() -> NativeKernels:
    return native_kernels()


@pytest.fixture(params=[1, 2, 8])
def many_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One, two with several panels at a time, or more than there are cores."""
    with torch_threads(request.param):
        yield


def submit(engine: Engine, name: str, num_tokens: int, depth: Depth = Depth.SHALLOW, **options: Any) -> None:
    sampling = SamplingParams(**{"max_tokens": 60, "temperature": 0.0, "ignore_eos": True, **options})
    engine.submit_generate(name, PROMPT[:num_tokens], depth, sampling)


def decoding(engine: Engine, lengths: list[int]) -> tuple[ScheduledRows, ...]:
    """Rows of answers to prompts of these lengths, of both depths. Their first blocks lie wherever some were free."""
    for name in ("gone", "kept"):
        submit(engine, name, 37)
        engine.step()
    engine.finish("gone")
    for index, length in enumerate(lengths):
        submit(engine, str(index), length, Depth.FULL if index % 3 == 1 else Depth.SHALLOW)
    assert any(len(engine.step().tokens) == len(lengths) + 1 for _ in range(20))
    engine.finish("kept")
    rows = engine.scheduler.schedule().rows
    assert len(rows) == len(lengths)
    return rows


def compare(
    engine: Engine, rows: tuple[ScheduledRows, ...], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits and all K/V: of the step in one call, of one whose layers are, and of one whose operations are. Nothing is
    left of one for the next."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(logits: torch.Tensor | None) -> None:
        assert logits is not None
        found.append((logits.clone(), torch.stack(engine.runner.pool.layers)))
        for layer in engine.runner.pool.layers:
            layer[written] = 0

    path, decoder = engine.runner.decode_path, engine.runner.decoder
    layers, asked = decoder._run_layers, list[torch.Tensor | None]()
    assert isinstance(path, NativeSteps) and layers is not None
    path.shortlist = None  # all logits are to be the same

    def run_layers(*arguments: Any) -> torch.Tensor | None:
        asked.append(layers(*arguments))
        return asked[-1]

    monkeypatch.setattr(decoder, "_run_layers", run_layers)
    batch = engine.runner.batch(rows)
    written = batch.kept.slots
    keep(path.run(rows))
    assert not asked
    keep(decoder.forward(batch, engine.runner.pool).logits)
    assert len(asked) == 1 and asked[0] is not None, "kept and skipped layers are one run"
    monkeypatch.setattr(decoder, "_run_layers", None)
    keep(decoder.forward(batch, engine.runner.pool).logits)
    return found


@pytest.mark.parametrize("streams", [1, 40])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.usefixtures("many_threads")
def test_the_same_as_any_step(
    kernels: NativeKernels, family: str, streams: int, is_int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = kernel_model(family, torch.bfloat16)
    held = parameters_of(model, 2).held(Int8Matrix.of) if is_int8 else None
    engine = make_engine(model, 2, kernels=kernels, parameters=held, num_blocks=2048)
    rows = decoding(engine, [1 + 7 * index % 140 for index in range(streams)])
    ours, layers, operations = compare(engine, rows, monkeypatch)
    assert all(map(torch.equal, ours, layers))
    assert all(map(torch.equal, ours, operations))


@pytest.mark.parametrize("num_skipped", [0, 2])
@pytest.mark.parametrize("is_int8", [False, True])
def test_a_vocabulary_that_fills_no_panel(
    kernels: NativeKernels, num_skipped: int, is_int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = kernel_model("llama", torch.bfloat16, vocab=108)
    held = parameters_of(model, num_skipped).held(Int8Matrix.of) if is_int8 else None
    engine = make_engine(model, num_skipped, kernels=kernels, parameters=held)
    ours, *others = compare(engine, decoding(engine, [9, 30, 4]), monkeypatch)
    assert ours[0].shape == (3, 108)
    assert all(all(map(torch.equal, ours, other)) for other in others)


@pytest.mark.parametrize(("streams", "is_whole"), [(1, True), (1, False), (12, True), (40, True)])
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.usefixtures("many_threads")
def test_whoever_does_a_piece(kernels: NativeKernels, streams: int, is_whole: bool, is_int8: bool) -> None:
    """With more threads than cores, some are left behind in most steps, with a piece that others do, too."""
    model = tiny_model("llama", torch.bfloat16, head_dim=64, vocab=1004, intermediate=1024)  # several panels a piece
    held = parameters_of(model, 2).held(Int8Matrix.of) if is_int8 else None
    engine = make_engine(model, 2, kernels=kernels, parameters=held, num_blocks=2048)
    rows = decoding(engine, [1 + 7 * index % 140 for index in range(streams)])
    path = engine.runner.decode_path
    assert isinstance(path, NativeSteps)
    if is_whole:
        path.shortlist = None
    logits = [path.run(rows) for _ in range(20)]
    assert all(one is not None and logits[0] is not None and torch.equal(one, logits[0]) for one in logits)


@pytest.mark.parametrize("num_skipped", [0, 2])
def test_answers_are_the_same(kernels: NativeKernels, num_skipped: int) -> None:
    """With prompts among them, choices that fork, blocks that run out, and all kinds of sampling."""
    model = kernel_model("llama", torch.bfloat16)
    depths = (Depth.SHALLOW, Depth.FULL)
    asks = [Ask([*PROMPT[: 5 + 11 * index]], num_tokens=20, depth=depths[index % 2]) for index in range(8)]
    asks.append(Ask([*PROMPT[:30]], sampling=SamplingParams(max_tokens=20, num_choices=3, seed=1)))
    ours, theirs = (make_engine(model, num_skipped, kernels=kernels, num_blocks=90) for _ in range(2))
    theirs.runner.decode_path = None
    taken = watched(ours)
    assert run_choices(ours, asks) == run_choices(theirs, asks)
    assert ours.scheduler.num_preemptions > 0
    assert any(len(rows) > 3 for rows, logits in taken if logits is not None)
    assert any(logits is None for _, logits in taken), "steps with prompts are none for it"


def watched(engine: Engine) -> list[tuple[tuple[ScheduledRows, ...], torch.Tensor | None]]:
    """What its decode path is asked, and answers."""
    path, taken = engine.runner.decode_path, list[tuple[tuple[ScheduledRows, ...], torch.Tensor | None]]()
    assert path is not None

    class Watched:
        def run(self, rows: tuple[ScheduledRows, ...]) -> torch.Tensor | None:
            logits = path.run(rows)
            taken.append((rows, logits))
            return logits

    engine.runner.decode_path = Watched()
    return taken


def test_what_it_leaves_to_others(kernels: NativeKernels) -> None:
    engine = make_engine(kernel_model("llama", torch.bfloat16), 2, kernels=kernels, num_blocks=2048)
    path = engine.runner.decode_path
    assert path is not None
    rows = decoding(engine, [9] * 2)
    sequence = rows[0].sequence
    before = [layer.clone() for layer in engine.runner.pool.layers]
    assert path.run(()) is None
    assert path.run(rows * 33) is None, "more than 64"
    assert path.run((rows[0], ScheduledRows(sequence, sequence.num_computed - 1, sequence.num_computed + 1))) is None
    assert path.run((ScheduledRows(sequence, 7, 8),)) is None, "not the last one"
    shallow, sequence.shallow = sequence.shallow, range(rows[0].end)
    assert path.run(rows) is None, "a shallow token"
    sequence.shallow, sequence.sampling = shallow, SamplingParams(max_tokens=0)
    assert path.run(rows) is None, "nothing is to follow"
    assert all(map(torch.equal, before, engine.runner.pool.layers))


def test_beyond_the_angles_that_are_kept_it_is_as_before(
    kernels: NativeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks = [Ask([*PROMPT[:length]], num_tokens=20) for length in (9, 30)]
    model = kernel_model("llama", torch.bfloat16)
    expected = run_choices(make_engine(model, 2, kernels=kernels), asks)
    monkeypatch.setattr(rope, "_MOST_POSITIONS", 40)
    engine = make_engine(model, 2, kernels=kernels)
    taken = watched(engine)
    assert run_choices(engine, asks) == expected
    told = [(max(item.start for item in rows), logits is None) for rows, logits in taken if rows[0].num_rows == 1]
    assert told == [(last, last >= 40) for last in range(30, 49)]


@pytest.mark.parametrize("lost", ["a block", "all tokens"])
def test_what_can_not_be_is_refused_before_anything_is_read(
    kernels: NativeKernels, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(kernel_model("llama", torch.bfloat16), 2, kernels=kernels)
    rows = decoding(engine, [9, 30])
    path, sequence = engine.runner.decode_path, rows[1].sequence
    assert path is not None
    if lost == "a block":
        del sequence.blocks[(rows[1].end - 1) // 4 :]
    else:
        sequence.prompt, sequence.output = (), []
        monkeypatch.setattr(Sequence, "last_token_id", 0)
        rows = (rows[0], ScheduledRows(sequence, -1, 0))
    with pytest.raises(InternalError, match="shoal_decode can't run"):
        path.run(rows)
