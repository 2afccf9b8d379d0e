"""What prefill ships of a prompt that begins like one before: the same, without computing it again. float64."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from engines import (
    Ask,
    ShippedTokens,
    assert_nothing_held,
    exact,
    make_engine,
    payload_of,
    prefill_chunks,
    run,
    run_handed_off,
)
from models import tiny_model

from shoal.engine.engine import Engine
from shoal.engine.runner import PrefillChunk
from shoal.engine.tables import Reuse
from shoal.errors import InternalError
from shoal.wire.handoff_messages import WireMode
from shoal.wire.messages import Stage

NUM_SKIPPED, BLOCK = 2, 4
PROMPT = [3 + index * 7 % 90 for index in range(30)]
LONGER = [*PROMPT[:22], *range(40, 60)]


@pytest.fixture(scope="module")
def model() -> Any:
    return exact(tiny_model("llama"))


def engine_of(model: Any, num_skipped: int = NUM_SKIPPED, reuse: Reuse = Reuse.EXACT, **options: Any) -> Engine:
    return make_engine(model, num_skipped, stage=Stage.PREFILL, block_tokens=BLOCK, reuse=reuse, **options)


class Computed:
    """How many rows an engine has run, step by step."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_rows: list[int] = []
        forward = engine.runner.decoder.forward

        def counting(batch: Any, pool: Any) -> Any:
            self.num_rows.append(len(batch.token_ids))
            return forward(batch, pool)

        monkeypatch.setattr(engine.runner.decoder, "forward", counting)


def whole(chunks: list[ShippedTokens]) -> torch.Tensor:
    """All layers of all tokens, which must follow one another without a gap."""
    for chunk, following in pairwise(chunks):
        assert chunk.end == following.start
    return torch.cat([chunk.kv for chunk in chunks], dim=1)


@pytest.mark.parametrize("num_skipped", [NUM_SKIPPED, 0])
@pytest.mark.parametrize("max_step_tokens", [512, 7])
def test_what_was_found_is_shipped_as_if_computed(
    model: Any, num_skipped: int, max_step_tokens: int, monkeypatch: pytest.MonkeyPatch
):
    engine = engine_of(model, num_skipped, max_step_tokens=max_step_tokens)
    plain = whole(prefill_chunks(engine_of(model, num_skipped, Reuse.NONE), LONGER))
    prefill_chunks(engine, PROMPT)
    computed = Computed(engine, monkeypatch)
    chunks = prefill_chunks(engine, LONGER)
    assert (chunks[0].start, chunks[-1].end) == (0, len(LONGER) - 1)
    assert max(chunk.end - chunk.start for chunk in chunks) <= max_step_tokens
    assert sum(computed.num_rows) == len(LONGER) - 1 - 20
    torch.testing.assert_close(whole(chunks), plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_present", [8, 20, 22, 32])
def test_what_decode_has_is_not_shipped(model: Any, num_present: int):
    engine = engine_of(model)
    plain = whole(prefill_chunks(engine_of(model, reuse=Reuse.NONE), LONGER))
    prefill_chunks(engine, PROMPT)
    chunks = [chunk for chunk in prefill_chunks(engine, LONGER, num_present=num_present) if chunk.start < chunk.end]
    assert (chunks[0].start, chunks[-1].end) == (num_present, len(LONGER) - 1)
    torch.testing.assert_close(whole(chunks), plain[:, num_present:], rtol=0, atol=1e-12)


def test_a_tenant_finds_nothing_of_another(model: Any, monkeypatch: pytest.MonkeyPatch):
    engine = engine_of(model)
    prefill_chunks(engine, PROMPT, tenant="a")
    computed = Computed(engine, monkeypatch)
    prefill_chunks(engine, PROMPT, tenant="b")
    assert computed.num_rows == [len(PROMPT) - 1]


def test_a_prompt_that_was_given_up_is_found_as_far_as_it_came(model: Any, monkeypatch: pytest.MonkeyPatch):
    engine = engine_of(model, max_step_tokens=10)
    engine.submit_prefill("given-up", len(PROMPT))
    engine.step()
    engine.start_shipping("given-up", tuple(PROMPT))
    engine.step()
    engine.finish("given-up")
    assert_nothing_held(engine)
    computed = Computed(engine, monkeypatch)
    prefill_chunks(engine, PROMPT)
    assert sum(computed.num_rows) == len(PROMPT) - 1 - 8


@pytest.mark.parametrize("num_present", [0, 20])
@pytest.mark.parametrize(("num_skipped", "layer"), [(NUM_SKIPPED, 0), (NUM_SKIPPED, 3), (0, 0), (0, 4)])
def test_what_was_found_and_is_no_number_is_forgotten(model: Any, num_skipped: int, layer: int, num_present: int):
    """It fails one prompt, and the next like it is computed anew: whoever asks again isn't answered so for ever."""
    engine = engine_of(model, num_skipped)
    plain = whole(prefill_chunks(engine_of(model, num_skipped, Reuse.NONE), LONGER))
    prefill_chunks(engine, PROMPT)
    pool = engine.runner.pool
    pool.layers[layer].masked_fill_(pool.layers[layer] != 0, torch.nan)
    with pytest.raises(InternalError, match="NaN"):
        prefill_chunks(engine, LONGER, num_present=num_present)
    assert_nothing_held(engine)
    torch.testing.assert_close(whole(prefill_chunks(engine, LONGER)), plain, rtol=0, atol=1e-12)


class Queue:
    """Prompts that are claimed before the first of them is computed, and what is shipped of them. It's read when all
    are done, as by a slow wire: K/V that are on their way must stay where they are."""

    def __init__(self, engine: Engine, prompts: dict[str, list[int]], *, wire_mode: WireMode = WireMode.KV) -> None:
        self._engine, self._prompts = engine, prompts
        self._parts: dict[str, list[PrefillChunk]] = {name: [] for name in prompts}
        for name, prompt in prompts.items():
            engine.submit_prefill(name, len(prompt))
        assert len(engine.step().reserved) == len(prompts)
        for name, prompt in prompts.items():
            engine.start_shipping(name, tuple(prompt), wire_mode=wire_mode)

    def step(self) -> bool:
        """Whether anything came of it."""
        output = self._engine.step()
        for failure in output.failures:
            raise failure.error
        for part in output.chunks:
            self._parts[part.request_id].append(part)
        return bool(output.chunks)

    def sent(self) -> None:
        """All that was computed has left."""
        for name in self._prompts:
            for sequence in self._engine._sequences[name].values():
                sequence.num_unsent = 0

    @property
    def is_done(self) -> bool:
        return all(
            parts and parts[-1].is_whole and parts[-1].end == len(self._prompts[name]) - 1
            for name, parts in self._parts.items()
        )

    def num_present(self, name: str) -> int:
        return self._parts[name][-1].num_present

    def spans(self, name: str) -> list[tuple[int, int]]:
        return [(part.start, part.end) for part in self._parts[name] if part.is_whole]

    def shipped(self, name: str) -> dict[int, torch.Tensor]:
        """All tokens, by the first of the layers that came together."""
        by_layer: dict[int, list[torch.Tensor]] = {}
        for part in self._parts[name]:
            of_states = part.wire_mode is WireMode.HIDDEN
            payload = payload_of(part, self._engine.runner.pool)
            by_layer.setdefault(part.layers.start, []).append(payload if of_states else payload.transpose(0, 1))
        return {layer: torch.cat(payloads) for layer, payloads in by_layer.items()}

    def run(self) -> dict[str, dict[int, torch.Tensor]]:
        while not self.is_done:
            assert self.step()
            self.sent()
        return self.end()

    def end(self) -> dict[str, dict[int, torch.Tensor]]:
        shipped = {name: self.shipped(name) for name in self._prompts}
        for name in self._prompts:
            self._engine.finish(name)
        assert_nothing_held(self._engine)
        return shipped


def alone(
    model: Any, prompt: list[int], num_skipped: int = NUM_SKIPPED, wire_mode: WireMode = WireMode.KV
) -> dict[int, torch.Tensor]:
    """What is shipped of a prompt that finds nothing."""
    queue = Queue(engine_of(model, num_skipped, Reuse.NONE), {"alone": prompt}, wire_mode=wire_mode)
    return queue.run()["alone"]


def assert_shipped(shipped: dict[int, torch.Tensor], expected: dict[int, torch.Tensor]) -> None:
    assert shipped.keys() == expected.keys()
    for layer, payload in expected.items():
        torch.testing.assert_close(shipped[layer], payload, rtol=0, atol=1e-12)


@pytest.mark.parametrize("wire_mode", WireMode)
@pytest.mark.parametrize("num_skipped", [NUM_SKIPPED, 0])
def test_of_two_that_wait_together_the_second_finds_what_the_first_has_computed(
    model: Any, num_skipped: int, wire_mode: WireMode, monkeypatch: pytest.MonkeyPatch
):
    engine = engine_of(model, num_skipped, max_step_tokens=len(PROMPT) - 1)
    computed = Computed(engine, monkeypatch)
    queue = Queue(engine, {"first": PROMPT, "second": LONGER}, wire_mode=wire_mode)
    shipped = queue.run()
    assert computed.num_rows == [len(PROMPT) - 1, len(LONGER) - 1 - 20]
    assert (queue.num_present("first"), queue.num_present("second")) == (0, 20)
    assert queue.spans("second") == [(0, 20), (20, len(LONGER) - 1)]
    for name, prompt in (("first", PROMPT), ("second", LONGER)):
        assert_shipped(shipped[name], alone(model, prompt, num_skipped, wire_mode))


@pytest.mark.parametrize("seed", range(5))
def test_whatever_waits_together_is_shipped_as_if_each_had_been_alone(model: Any, seed: int):
    """Beginnings of any length, steps of any size, a wire that now and then is slow, pools with little room."""
    rng = random.Random(seed)
    prompts: list[list[int]] = [PROMPT]
    while len(prompts) < 7:
        known = rng.choice(prompts)
        prompts.append([*known[: rng.randrange(len(known))], *(rng.randrange(90) for _ in range(rng.randrange(3, 20)))])
    num_blocks = sum(-(-(len(prompt) - 1) // BLOCK) for prompt in prompts)
    engine = engine_of(model, max_step_tokens=rng.randrange(3, 40), num_blocks=num_blocks + rng.choice([0, 20, 100]))
    for _ in range(2):
        rng.shuffle(prompts)
        queue = Queue(engine, {str(index): prompt for index, prompt in enumerate(prompts)})
        while not queue.is_done:
            if not queue.step() or rng.random() < 0.5:
                queue.sent()
        shipped = queue.end()
        for index, prompt in enumerate(prompts):
            assert_shipped(shipped[str(index)], alone(model, prompt))


def test_decode_answers_the_same_from_what_was_found(model: Any):
    prefill = engine_of(model)
    asks = [Ask(PROMPT), Ask(LONGER), Ask(PROMPT)]
    plain = run(make_engine(model, NUM_SKIPPED, block_tokens=BLOCK), asks)
    decode = make_engine(model, NUM_SKIPPED, block_tokens=BLOCK)
    assert [run_handed_off(prefill, decode, [ask])[0] for ask in asks] == plain
