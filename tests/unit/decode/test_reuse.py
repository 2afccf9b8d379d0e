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
from shoal.engine.engine import Engine
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


@pytest.mark.parametrize("local", [("exact", "none")], indirect=True)
async def test_what_prefill_had_counts_as_cached(local: LocalShoal, model: Any):
    await ask(local, PROMPT)
    other = (*PROMPT[:58], *range(70, 90))
    tokens, report = await ask(local, other)
    assert tokens == pop_generate(model, other, 5, SKIPPED).token_ids
    assert report.transferred and report.num_cached_tokens == 56


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
