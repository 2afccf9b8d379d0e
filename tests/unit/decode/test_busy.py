"""A prompt that prefill is too busy for is an idle decode replica's; and each prompt's way is counted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_tiny
from reference import pop_generate

from shoal.cluster.local import LocalShoal, open_local
from shoal.config import load_config
from shoal.decode import worker
from shoal.engine.scheduler import StepPlan
from shoal.handoff.prefill_side import PromptClaim
from shoal.wire.messages import Depth, GenerateRequest, RequestContext, SamplingParams, TokenOutput, TtftStages

SKIPPED = 3
PROMPT = [5, 17, 40, 3, 88, 22, 9, 61, 30, 12, 77, 45, 6, 19, 52, 33, 71, 28, 90, 14, 66, 8, 41, 25]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return save_tiny(folder, dtype=torch.float32, layers=6)


@asynccontextmanager
async def opened(folder: Path, *, decode: dict[str, Any] | None = None, **handoff: Any) -> AsyncIterator[LocalShoal]:
    stage = {"num_blocks": 64, "block_tokens": 4, "num_threads": 1}
    config = load_config(
        model={"name": str(folder), "skip_layers": SKIPPED, "dtype": "float32"},
        prefill=stage, decode=stage | (decode or {}), handoff=handoff,
    )  # fmt: skip
    async with open_local(config) as local:
        yield local
        await asyncio.wait_for(local.decode.desk.idle.wait(), 5)
        for one in (local.prefill, local.decode):
            while (counts := await one.counts()).num_running:
                await asyncio.sleep(0)
            assert counts.num_free_blocks == counts.num_blocks and not counts.num_waiting


def request(prompt: list[int], depth: Depth = Depth.SHALLOW, **sampling: Any) -> GenerateRequest:
    params = SamplingParams(**{"max_tokens": 4, "temperature": 0.0, "ignore_eos": True} | sampling)
    return GenerateRequest(RequestContext("test", 30.0), "tiny", tuple(prompt), depth, params)


async def collect(local: LocalShoal, asked: GenerateRequest) -> list[TokenOutput]:
    return [output async for output in local.decode.worker.generate(asked)]


def ids(outputs: list[TokenOutput]) -> tuple[int, ...]:
    return tuple(token for output in outputs for token in output.token_ids)


def ways(local: LocalShoal) -> dict[str, float]:
    """How many prompts went each way that any has gone."""
    samples = [sample for family in local.decode.registry.collect() for sample in family.samples]
    counted = {one.labels["way"]: one.value for one in samples if one.name == "shoal_prompts_total"}
    return {way: number for way, number in counted.items() if number}


def hold_up(local: LocalShoal, what: str, until: threading.Event) -> None:
    """Prefill takes no more commands, and so claims nothing; or it claims prompts and computes none."""
    if what == "commands":
        local.prefill.engine.post(lambda _: until.wait(30) and None)
        return
    scheduler = local.prefill.engine._thread._engine.scheduler
    schedule = scheduler.schedule

    def late() -> StepPlan:
        assert until.wait(30)
        return schedule()

    scheduler.schedule = late  # type: ignore[method-assign]


@pytest.mark.parametrize("what", ["commands", "steps"])
async def test_what_a_busy_prefill_has_not_begun_an_idle_decode_computes(model: Any, folder: Path, what: str) -> None:
    """One after the other: who computes one isn't idle. No fault is counted, and none of the ladder's attempts."""
    async with opened(folder, busy_after_s=0.02) as local:
        may_go_on, log = threading.Event(), list[str]()
        hold_up(local, what, may_go_on)
        decides = local.decode.worker._ways
        is_better_here = decides.is_better_here

        def decide(waited_s: float) -> bool:
            if better := is_better_here(waited_s):
                log.append("begins")
            return better

        async def ask(prompt: list[int]) -> list[TokenOutput]:
            outputs = await collect(local, request(prompt))
            log.append("is done")
            return outputs

        decides.is_better_here = decide  # type: ignore[method-assign]
        prompts = (PROMPT, PROMPT[::-1])
        try:
            answers = await asyncio.wait_for(asyncio.gather(*map(ask, prompts)), 20)
        finally:
            may_go_on.set()
        assert ways(local) == {"busy": 2} and log == ["begins", "is done"] * 2
        for prompt, outputs in zip(prompts, answers, strict=True):
            assert ids(outputs) == pop_generate(model, prompt, 4, SKIPPED).token_ids
            report = outputs[0].handoff
            assert report is not None and not report.transferred and report.fallback is None
            assert report.depth is Depth.SHALLOW
        [told] = [family for family in local.decode.registry.collect() if family.name == "shoal_kv_fallback"]
        assert not any(sample.value for sample in told.samples)


async def test_a_prompt_of_which_something_has_come_is_prefills(model: Any, folder: Path) -> None:
    """However slowly the rest comes."""
    async with opened(folder) as local:
        looked, sends, may_send = asyncio.Event(), asyncio.Event(), asyncio.Event()
        decides, send = local.decode.worker._ways, PromptClaim.send

        def look(_waited_s: float) -> float:
            if sends.is_set():
                looked.set()
            return 0.01

        async def send_late(claim: PromptClaim, *values: Any) -> None:
            await send(claim, *values)
            while not any(held.lease.has_begun for held in local.decode.desk._open.values()):
                await asyncio.sleep(0)
            decides._config = decides._config.model_copy(update={"busy_after_s": 0.01})
            sends.set()
            await may_send.wait()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PromptClaim, "send", send_late)
            decides.look_s = look  # type: ignore[method-assign]
            asked = asyncio.create_task(collect(local, request(PROMPT)))
            await asyncio.wait_for(looked.wait(), 10)
            may_send.set()
            assert ids(await asked) == pop_generate(model, PROMPT, 4, SKIPPED).token_ids
        assert ways(local) == {"handed_off": 1}


@pytest.mark.usefixtures("model")
async def test_each_prompt_is_counted_by_its_way(folder: Path) -> None:
    async with opened(folder, decode={"reuse": "exact"}, min_tokens=8, local_tokens=16) as local:
        await collect(local, request(PROMPT))
        await collect(local, request(PROMPT[:5]))
        await collect(local, request(PROMPT, Depth.FULL))
        await collect(local, request(PROMPT, Depth.FULL, num_prompt_logprobs=0))
        await collect(local, request(PROMPT))
        assert ways(local) == {"handed_off": 1, "short": 1, "full_depth": 1, "prompt_logprobs": 1, "cached": 1}
        local.decode.worker.prefill = None
        await collect(local, request(PROMPT[::-1]))
        assert ways(local)["no_pool"] == 1


@pytest.mark.usefixtures("model")
async def test_who_waits_for_prefill_in_vain_does_not_wait_for_a_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It's a part of the time to the first token, which the stages add up to whoever computes a prompt."""
    after_s, took_s, stages_of = 0.5, list[float](), worker._stages

    def stages_told(begun: Any, first: Any) -> TtftStages:
        took_s.append(first.ended_s - begun.submitted_s)
        return stages_of(begun, first)

    def queued_s(local: LocalShoal) -> float:
        return local.decode.registry.get_sample_value("shoal_queue_seconds_sum", {"pool": "decode"}) or 0.0

    monkeypatch.setattr(worker, "_stages", stages_told)
    async with opened(folder, busy_after_s=after_s) as local:
        all_stages = list[TtftStages]()

        async def ask(asked: GenerateRequest) -> TtftStages:
            stages = (await collect(local, asked))[0].stages
            assert stages is not None
            all_stages.append(stages)
            return stages

        handed_off = await ask(request(PROMPT))
        assert queued_s(local) == handed_off.reserve_s > 0
        before_s = queued_s(local)
        own = await ask(request(PROMPT, Depth.FULL))
        assert own.reserve_s == 0 and queued_s(local) - before_s == pytest.approx(own.queue_s)
        before_s = queued_s(local)
        may_go_on = threading.Event()
        hold_up(local, "commands", may_go_on)
        try:
            late = await asyncio.wait_for(ask(request(PROMPT[::-1])), 20)
        finally:
            may_go_on.set()
        assert ways(local) == {"handed_off": 1, "full_depth": 1, "busy": 1}
        assert late.reserve_s > 0 and late.queue_s >= after_s
        assert 0 < queued_s(local) - before_s <= late.reserve_s + late.queue_s - after_s
    assert [stages.total_s for stages in all_stages] == pytest.approx(took_s)
