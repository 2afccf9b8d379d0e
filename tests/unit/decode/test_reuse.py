"""What decode has of a prompt already isn't shipped again, and little that is left isn't handed off at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_tiny
from reference import pop_generate

from shoal.cluster.local import LocalShoal, open_local
from shoal.config import ShoalConfig, load_config
from shoal.decode.tempo import Tempo
from shoal.engine.engine import Engine
from shoal.engine.scheduler import Scheduler, StepPlan
from shoal.wire.messages import Depth, GenerateRequest, HandoffReport, RequestContext, SamplingParams

SKIPPED, BLOCK = 3, 4
PROMPT = tuple(3 + index * 7 % 90 for index in range(60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return save_tiny(folder, dtype=torch.float32, layers=6)


@pytest.fixture(params=[("none", "exact")], ids=str)
async def local(model: Any, folder: Path, request: pytest.FixtureRequest) -> AsyncIterator[LocalShoal]:
    """``params``: what prefill and decode reuse."""
    async with open_local(config_of(folder, request.param)) as opened:
        yield opened
        await asyncio.wait_for(opened.decode.desk.idle.wait(), 5)
        counts = await opened.decode.counts()
        assert counts.num_free_blocks == counts.num_blocks


def config_of(folder: Path, reuses: tuple[str, str], *, max_step_tokens: int = 16) -> ShoalConfig:
    stage = {"num_blocks": 64, "block_tokens": BLOCK, "max_step_tokens": max_step_tokens, "num_threads": 1}
    prefill, decode = ({"reuse": reuse} for reuse in reuses)
    return load_config(
        model={"name": str(folder), "skip_layers": SKIPPED, "dtype": "float32"},
        prefill=stage | prefill,
        decode=stage | decode,
        handoff={"local_tokens": 12},
    )


async def ask(local: LocalShoal, prompt: tuple[int, ...], tenant: str = "a") -> tuple[tuple[int, ...], HandoffReport]:
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    request = GenerateRequest(RequestContext("test", 30, tenant=tenant), "tiny", prompt, Depth.SHALLOW, params)
    outputs = [output async for output in local.decode.worker.generate(request)]
    report = outputs[0].handoff
    assert report is not None
    return tuple(token for output in outputs for token in output.token_ids), report


async def test_little_that_is_left_is_computed_by_decode(local: LocalShoal, model: Any):
    _, first = await ask(local, PROMPT)
    assert first.transferred and first.num_cached_tokens == 0
    longer = (*PROMPT, 5, 6, 7)
    tokens, report = await ask(local, longer)
    assert tokens == pop_generate(model, longer, 5, SKIPPED).token_ids
    assert (report.transferred, report.fallback, report.num_cached_tokens) == (False, None, 56)


async def test_only_what_is_missing_is_shipped(local: LocalShoal, model: Any):
    _, first = await ask(local, PROMPT[:22])
    other = (*PROMPT[:22], *range(40, 70))
    tokens, report = await ask(local, other)
    assert tokens == pop_generate(model, other, 5, SKIPPED).token_ids
    assert report.transferred and report.num_cached_tokens == 20
    assert report.shallow_bytes == first.shallow_bytes // 21 * (len(other) - 1 - 20)


async def test_another_tenant_has_its_own_shipped(local: LocalShoal):
    await ask(local, PROMPT)
    _, report = await ask(local, PROMPT, tenant="b")
    assert report.transferred and report.num_cached_tokens == 0


@pytest.mark.parametrize("local", [("exact", "none")], indirect=True)
async def test_what_prefill_had_counts_as_cached(local: LocalShoal, model: Any):
    await ask(local, PROMPT)
    other = (*PROMPT[:58], *range(70, 90))
    tokens, report = await ask(local, other)
    assert tokens == pop_generate(model, other, 5, SKIPPED).token_ids
    assert report.transferred and report.num_cached_tokens == 56


@pytest.mark.parametrize("local", [("exact", "none"), ("none", "exact")], indirect=True)
async def test_how_long_prompts_take_is_learned_of_what_was_computed_alone(
    local: LocalShoal, monkeypatch: pytest.MonkeyPatch
):
    """Admission is told, before the first token, how much either pool had of the prompt."""
    learned = []
    monkeypatch.setattr(Tempo, "began", lambda _, first_s, num_prompt_tokens: learned.append(num_prompt_tokens))
    reports = [(await ask(local, PROMPT))[1] for _ in range(2)]
    assert reports[1].num_cached_tokens > 40
    assert learned == [len(PROMPT), len(PROMPT) - reports[1].num_cached_tokens]


def spoil(engine: Engine) -> None:
    """What it has of the first layer, as a defect would."""
    kv = engine.runner.pool.layers[0]
    kv.masked_fill_(kv != 0, torch.nan)


@pytest.mark.parametrize("local", [("exact", "none")], indirect=True)
async def test_a_prompt_is_answered_though_what_prefill_had_of_it_were_no_numbers(local: LocalShoal, model: Any):
    await ask(local, PROMPT)
    await local.prefill.engine.call(spoil)
    expected = pop_generate(model, PROMPT, 5, SKIPPED).token_ids
    tokens, report = await ask(local, PROMPT)
    assert tokens == expected and (report.transferred, report.fallback) == (False, "internal_error")
    tokens, report = await ask(local, PROMPT)
    assert tokens == expected and report.transferred and report.num_cached_tokens == 0


async def test_what_prefill_computed_for_another_meanwhile_counts_as_cached(
    model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Both are claimed before the first of them is computed."""
    first, second = (*PROMPT, *range(5)), (*PROMPT[:58], *range(70, 90))
    schedule, together = Scheduler.schedule, list[object]()

    def schedule_both(scheduler: Scheduler) -> StepPlan:
        shipping = [one for one in scheduler.running if not one.sampled]
        if len(shipping) == 1 and not together:
            return StepPlan((), ())
        together.extend(shipping)
        return schedule(scheduler)

    async with open_local(config_of(folder, ("exact", "none"), max_step_tokens=len(first) - 1)) as local:
        monkeypatch.setattr(Scheduler, "schedule", schedule_both)
        answers = await asyncio.gather(ask(local, first), ask(local, second))
        for prompt, (tokens, _) in zip((first, second), answers, strict=True):
            assert tokens == pop_generate(model, prompt, 5, SKIPPED).token_ids
        assert [report.num_cached_tokens for _, report in answers] == [0, 56]
        registry = local.prefill.registry
        counted = {
            source: registry.get_sample_value("shoal_prefill_tokens_total", {"source": source})
            for source in ("computed", "cached")
        }
        assert counted == {"computed": len(first) - 1 + len(second) - 1 - 56, "cached": 56}
