"""The kept layers of a prompt leave before the others are projected, and nothing runs in between."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engines import assert_nothing_held, exact, make_engine, payload_of, prefill_chunks
from models import tiny_model

from shoal.engine import runner
from shoal.engine.build import warm_up
from shoal.engine.client import ChunkComputed, EngineClient
from shoal.engine.engine import Engine
from shoal.engine.runner import PrefillChunk
from shoal.errors import InternalError
from shoal.wire.handoff_messages import WireMode
from shoal.wire.messages import Stage

NUM_LAYERS, NUM_SKIPPED = 6, 2
KEPT, SKIPPED = range(NUM_LAYERS - NUM_SKIPPED), range(NUM_LAYERS - NUM_SKIPPED, NUM_LAYERS)
PROMPT = tuple(3 + index * 7 % 90 for index in range(21))


@pytest.fixture(scope="module")
def model() -> Any:
    return exact(tiny_model("llama"))


def engine_with(model: Any, *names: str, **options: Any) -> Engine:
    """Every prompt's ids are known, and none has run."""
    engine = make_engine(model, NUM_SKIPPED, stage=Stage.PREFILL, **options)
    for name in names:
        engine.submit_prefill(name, len(PROMPT))
    engine.step()
    for name in names:
        engine.start_shipping(name, PROMPT)
    return engine


def told(chunks: tuple[PrefillChunk, ...]) -> list[tuple[str, range, bool]]:
    return [(chunk.request_id, chunk.layers, chunk.is_whole) for chunk in chunks]


def test_the_kept_layers_come_first_and_each_prompts_others_by_themselves(model: Any) -> None:
    engine = engine_with(model, "a", "b")
    first = engine.step()
    assert told(first.chunks) == [("a", KEPT, False), ("b", KEPT, False)] and first.num_rows == 2 * (len(PROMPT) - 1)
    assert [told(engine.step().chunks) for _ in "ab"] == [[("a", SKIPPED, True)], [("b", SKIPPED, True)]]
    assert engine.step().is_idle


@pytest.fixture
def a_layer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "PROJECTED_BYTES", 1)


ONE_BY_ONE = [range(layer, layer + 1) for layer in SKIPPED]


@pytest.mark.usefixtures("a_layer_at_a_time")
def test_layers_are_projected_some_at_a_time_each_prompts_together(model: Any) -> None:
    engine = engine_with(model, "a", "b")
    engine.step()
    seen = [told(engine.step().chunks) for _ in (*ONE_BY_ONE, *ONE_BY_ONE)]
    assert seen == [[(name, layers, layers == ONE_BY_ONE[-1])] for name in "ab" for layers in ONE_BY_ONE]
    assert engine.step().is_idle


@pytest.mark.usefixtures("a_layer_at_a_time")
def test_in_pieces_the_same_is_shipped(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    [pieces] = prefill_chunks(make_engine(model, NUM_SKIPPED, stage=Stage.PREFILL), list(PROMPT))
    monkeypatch.setattr(runner, "PROJECTED_BYTES", 1 << 30)
    [whole] = prefill_chunks(make_engine(model, NUM_SKIPPED, stage=Stage.PREFILL), list(PROMPT))
    torch.testing.assert_close(pieces.kv, whole.kv, rtol=1e-12, atol=1e-12)


def test_what_waits_to_be_sent_stays_what_it_was(model: Any) -> None:
    """Two chunks each of two prompts, while others are computed."""
    engine = engine_with(model, "a", "b", max_step_tokens=11)
    pool, parts, early = engine.runner.pool, list[PrefillChunk](), list[torch.Tensor]()
    while not (output := engine.step()).is_idle:
        parts += output.chunks
        early += [payload_of(part, pool).clone() for part in output.chunks]
    assert [part.request_id for part in parts].count("a") >= 3 and {part.request_id for part in parts} == {"a", "b"}
    for part, seen in zip(parts, early, strict=True):
        assert torch.equal(payload_of(part, pool), seen)


def test_a_prompt_that_could_run_waits_for_those_that_are_to_be_projected(model: Any) -> None:
    """Its rows could overwrite what they are projected from."""
    engine = engine_with(model, "a")
    engine.step()
    engine.submit_prefill("b", len(PROMPT))
    assert [reservation.request_id for reservation in engine.step().reserved] == ["b"]
    engine.start_shipping("b", PROMPT)
    assert told(engine.step().chunks) == [("a", SKIPPED, True)]
    assert told(engine.step().chunks) == [("b", KEPT, False)]


def test_who_was_given_up_in_between_is_not_projected_and_holds_up_nobody(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_with(model, "a", "b")
    engine.step()
    engine.finish("a")
    projected: list[str] = []
    project = engine.runner.project
    monkeypatch.setattr(
        engine.runner, "project", lambda item: projected.append(item.sequence.request_id) or project(item)
    )
    output = engine.step()
    assert told(output.chunks) == [("b", SKIPPED, True)] and not output.is_idle
    engine.finish("b")
    assert projected == ["b"] and engine.step().is_idle
    assert_nothing_held(engine)


def test_a_projection_that_fails_ends_its_own_prompt_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_with(model, "a", "b")
    engine.step()
    with monkeypatch.context() as patched:
        patched.setattr(engine.runner.decoder, "project", broken)
        output = engine.step()
    [failure] = output.failures
    assert failure.request_id == "a" and not output.all_failed and not output.is_idle
    assert isinstance(failure.error, InternalError) and "secret" not in failure.error.message
    assert told(engine.step().chunks) == [("b", SKIPPED, True)]
    engine.finish("b")
    assert_nothing_held(engine)


@pytest.mark.parametrize("fails", [True, False])
async def test_a_replica_whose_projections_all_fail_is_not_healthy_and_one_with_some_is(
    model: Any, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept is computed each time, and yet no prompt comes any further; or of two each time one."""
    core = make_engine(model, NUM_SKIPPED, stage=Stage.PREFILL)
    client = EngineClient(core, name="test")
    try:
        for number in range(3):
            assert client.is_serving
            names = [f"breaks {number}", *([] if fails else [f"goes on {number}"])]
            engine = engine_with(model, *names)
            outputs = [engine.step()]
            with monkeypatch.context() as patched:
                patched.setattr(engine.runner.decoder, "project", broken)
                outputs.append(engine.step())
            outputs += [] if fails else [engine.step()]
            for output in outputs:
                client._deliver(output)
        assert client.is_serving == (not fails)
    finally:
        client.close()


def broken(*_args: object) -> torch.Tensor:
    raise RuntimeError("secret details")


def test_a_replica_that_can_not_project_does_not_become_ready(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(model, NUM_SKIPPED, stage=Stage.PREFILL)
    monkeypatch.setattr(engine.runner.decoder, "project", broken)
    with pytest.raises(InternalError):
        warm_up(engine, Stage.PREFILL, torch.device("cpu"))


def test_states_need_no_projecting_and_come_with_the_kept_layers(model: Any) -> None:
    engine = make_engine(model, NUM_SKIPPED, stage=Stage.PREFILL)
    engine.submit_prefill("a", len(PROMPT))
    engine.step()
    engine.start_shipping("a", PROMPT, wire_mode=WireMode.HIDDEN)
    kept, states = engine.step().chunks
    assert told((kept, states)) == [("a", KEPT, False), ("a", SKIPPED, True)]
    assert (kept.wire_mode, states.wire_mode) == (WireMode.KV, WireMode.HIDDEN)
    assert states.payload.shape == (len(PROMPT) - 1, engine.runner.decoder.spec.hidden_size)
    assert engine.step().is_idle


def test_a_chunk_counts_as_sent_once_all_of_it_is(model: Any) -> None:
    """Two may wait to be sent; a third isn't computed."""
    engine = engine_with(model, "a", max_step_tokens=5)
    seen = [told(engine.step().chunks) for _ in range(4)]
    assert seen == [[("a", KEPT, False)], [("a", SKIPPED, True)]] * 2 and engine.step().is_idle
    engine.chunk_sent("a")
    assert told(engine.step().chunks) == [("a", KEPT, False)]


async def test_what_is_kept_is_told_before_the_others_are_projected(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_engine(model, NUM_SKIPPED, stage=Stage.PREFILL)
    loop, may_project = asyncio.get_running_loop(), asyncio.Event()
    project = core.runner.project

    def when_told(item: Any) -> Iterator[PrefillChunk]:
        asyncio.run_coroutine_threadsafe(may_project.wait(), loop).result(10)
        return project(item)

    monkeypatch.setattr(core.runner, "project", when_told)
    client = EngineClient(core, name="test")
    try:
        with client.open("a") as inbox:
            await client.call(lambda engine: engine.submit_prefill("a", len(PROMPT)))
            await inbox.reserved()
            await client.call(lambda engine: engine.start_shipping("a", PROMPT))
            kept = await asyncio.wait_for(inbox.next(), 10)
            assert isinstance(kept, ChunkComputed) and kept.chunk.layers == KEPT
            may_project.set()
            others = await asyncio.wait_for(inbox.next(), 10)
            assert isinstance(others, ChunkComputed) and others.chunk.layers == SKIPPED
            assert others.first_step_s == kept.first_step_s < kept.ended_s < others.ended_s
    finally:
        client.close()
