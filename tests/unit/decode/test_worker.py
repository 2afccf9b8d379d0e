"""Both stages in one process over a tiny model: what a request goes through, and what it gives back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_tiny
from reference import full_generate, pop_generate, speed_generate

from shoal.cluster.local import LocalShoal, OneReplica, open_local
from shoal.config import load_config
from shoal.decode import worker
from shoal.decode.prefill_pool import PrefillPool
from shoal.decode.sink import PoolSink
from shoal.engine.runner import Runner
from shoal.errors import (
    DeadlineExceeded,
    InvalidRequest,
    LeaseLost,
    Overloaded,
    PeerGone,
    PlanMismatch,
    ShoalError,
    Unavailable,
)  # fmt: skip
from shoal.handoff.prefill_side import PromptClaim
from shoal.model.kv_rows import KvRows
from shoal.wire.handoff_messages import Grant, HandoffOutcome  # fmt: skip
from shoal.wire.messages import (  # fmt: skip
    Depth,
    FinishReason,
    GenerateRequest,
    PromptOutline,
    RequestContext,
    SamplingParams,
    TokenOutput,
)

SKIPPED = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return save_tiny(folder, dtype=torch.float32, layers=6)


@pytest.fixture
def opened(model: Any, folder: Path) -> Callable[..., Any]:
    @asynccontextmanager
    async def open_it(**overrides: Any) -> AsyncIterator[LocalShoal]:
        stage = {"num_blocks": 64, "block_tokens": 4, "max_step_tokens": 16, "num_threads": 1}
        config = load_config(
            model={"name": str(folder)} | overrides.pop("model", {"skip_layers": SKIPPED, "dtype": "float32"}),
            prefill=stage | overrides.pop("prefill", {}),
            decode=stage | overrides.pop("decode", {}),
            **overrides,
        )
        async with open_local(config) as local:
            yield local
            await assert_nothing_held(local)

    return open_it


async def assert_nothing_held(local: LocalShoal) -> None:
    """Leases end a moment after their request; the desk says when the last one has."""
    await asyncio.wait_for(local.decode.desk.idle.wait(), 5)
    while (await local.prefill.counts()).num_running:
        await asyncio.sleep(0)
    for stage in (local.prefill, local.decode):
        counts = await stage.counts()
        assert (counts.num_waiting, counts.num_reserved, counts.num_running) == (0, 0, 0)
        assert counts.num_free_blocks == counts.num_blocks and counts.num_reserved_blocks == 0
        assert counts.num_free_deep_blocks == counts.num_deep_blocks


def request(
    prompt: list[int], depth: Depth = Depth.SHALLOW, timeout_s: float = 30.0, attempt: int = 1, **sampling: Any
) -> GenerateRequest:
    params = SamplingParams(**{"max_tokens": 10, "temperature": 0.0, "ignore_eos": True} | sampling)
    return GenerateRequest(RequestContext("test", timeout_s, attempt=attempt), "tiny", tuple(prompt), depth, params)


async def collect(local: LocalShoal, asked: GenerateRequest) -> list[TokenOutput]:
    return [output async for output in local.decode.worker.generate(asked)]


def ids(outputs: list[TokenOutput], choice: int = 0) -> tuple[int, ...]:
    return tuple(token for output in outputs if output.choice == choice for token in output.token_ids)


PROMPT = [5, 17, 40, 3, 88, 22, 9, 61, 30, 12, 77, 45, 6, 19, 52, 33, 71, 28, 90, 14, 66, 8, 41, 25]


async def test_a_shallow_prompt_goes_through_both_stages(opened: Any, model: Any):
    async with opened() as local:
        outputs = await collect(local, request(PROMPT))
    assert ids(outputs) == pop_generate(model, PROMPT, 10, SKIPPED).token_ids
    report, stages = outputs[0].handoff, outputs[0].stages
    assert report is not None and report.transferred and report.fallback is None
    token_layer_bytes = 2 * 2 * 16 * 4
    assert report.shallow_bytes == 3 * (len(PROMPT) - 1) * token_layer_bytes
    assert report.deep_bytes == SKIPPED * (len(PROMPT) - 1) * token_layer_bytes and report.boundary_bytes == 4
    assert stages is not None and stages.prefill_s > 0 and stages.boundary_step_s > 0
    assert stages.transfer_exposed_s >= 0
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert all(output.handoff is None for output in outputs[1:])


async def test_a_speed_plan_ships_no_deep_layer(opened: Any, model: Any):
    plan = {"skip_layers": SKIPPED, "dtype": "float32", "plan": "speed"}
    outline = PromptOutline(num_system_tokens=9, num_header_tokens=3)
    for anchors, num_anchors in (("bos", 1), (4, 4), ("system", 9)):
        async with opened(model=plan | {"anchors": anchors}) as local:
            outputs = await collect(local, replace(request(PROMPT), outline=outline))
        expected = speed_generate(model, PROMPT, 10, SKIPPED, num_anchors=num_anchors, num_last=3)
        assert ids(outputs) == expected.token_ids
        report = outputs[0].handoff
        assert report is not None and report.transferred and report.deep_bytes == 0
        assert report.shallow_bytes == 3 * (len(PROMPT) - 1) * 2 * 2 * 16 * 4


async def test_an_answer_by_a_speed_plan_holds_fewer_bytes(opened: Any):
    """24 prompt tokens and 10 generated, of which the last is never run: 9 blocks of 4, of which deep layers need 3."""
    held = {}
    for plan in ("pop", "speed"):
        model = {"skip_layers": SKIPPED, "dtype": "float32", "plan": plan, "deep_blocks_ratio": 0.5}
        async with opened(model=model) as local:
            assert (await local.decode.counts()).num_deep_blocks == (32 if plan == "speed" else 0)
            await collect(local, request(PROMPT))
            registry = local.decode.registry
            assert registry.get_sample_value("shoal_kv_choice_bytes_count") == 1
            held[plan] = registry.get_sample_value("shoal_kv_choice_bytes_sum")
    block_layer_bytes = 4 * 2 * 2 * 16 * 4
    assert held == {"pop": 9 * 6 * block_layer_bytes, "speed": (9 + 3) * 3 * block_layer_bytes}


async def test_full_depth_and_one_token_prompts_are_prefilled_by_decode(opened: Any, model: Any):
    async with opened() as local:
        for prompt, depth in ((PROMPT, Depth.FULL), ([7], Depth.SHALLOW)):
            outputs = await collect(local, request(prompt, depth))
            assert ids(outputs) == full_generate(model, prompt, 10).token_ids
            report = outputs[0].handoff
            assert report is not None and not report.transferred and report.fallback is None
            assert report.depth is Depth.FULL


async def test_many_at_once_are_one_by_one(opened: Any, model: Any):
    prompts = [PROMPT[:length] for length in range(2, 24)]
    async with opened(decode={"num_blocks": 256}) as local:
        answers = await asyncio.gather(*(collect(local, request(prompt)) for prompt in prompts))
    for prompt, outputs in zip(prompts, answers, strict=True):
        assert ids(outputs) == pop_generate(model, prompt, 10, SKIPPED).token_ids
        assert outputs[0].handoff is not None and outputs[0].handoff.transferred


async def test_choices_share_one_transfer(opened: Any, model: Any):
    async with opened() as local:
        outputs = await collect(local, request(PROMPT, num_choices=3))
    for choice in range(3):
        assert ids(outputs, choice) == pop_generate(model, PROMPT, 10, SKIPPED).token_ids
    assert sum(output.handoff is not None for output in outputs) == 1


class ScriptedPool:
    """Prefill replicas ``a``, ``b``, … of which each but the last does what its script says, once; the last one serves.

    A script raises an error, or gives the lease up for a reason. ``None`` in place of ``behind``: there is no last one.
    """

    unfit: frozenset[str] = frozenset()

    def __init__(self, behind: PrefillPool | None, *scripts: ShoalError | str) -> None:
        self.grants: list[Grant] = []
        self._behind = behind
        self._scripts = scripts
        self._asked: dict[bytes, str] = {}

    async def living(self, *, now: bool = False) -> frozenset[str]:
        return frozenset("abcdef"[: len(self._scripts) + (self._behind is not None)])

    async def ask(self, grant: Grant) -> HandoffOutcome:
        self.grants.append(grant)
        replica = min(await self.living() - grant.excluded)
        self._asked[grant.lease_id] = replica
        index = "abcdef".index(replica)
        if index == len(self._scripts):
            assert self._behind is not None
            return await self._behind.ask(grant)
        script = self._scripts[index]
        if isinstance(script, ShoalError):
            raise script
        return HandoffOutcome(grant.lease_id, committed=False, reason=script)

    def asked(self, grant: Grant) -> str | None:
        return self._asked.get(grant.lease_id)


class BothServe(ScriptedPool):
    """``a`` and ``b``."""

    async def living(self, *, now: bool = False) -> frozenset[str]:
        return frozenset("ab")

    async def ask(self, grant: Grant) -> HandoffOutcome:
        self.grants.append(grant)
        self._asked[grant.lease_id] = min(await self.living() - grant.excluded)
        assert self._behind is not None
        return await self._behind.ask(grant)


class NobodyAnswers(OneReplica):
    """A prefill replica that takes every grant and never claims."""

    def __init__(self) -> None:
        self.has_asked = asyncio.Event()

    async def ask(self, _grant: Grant) -> HandoffOutcome:
        self.has_asked.set()
        await asyncio.Event().wait()
        raise AssertionError


class Emptied(NobodyAnswers):
    """Its last replica is gone as soon as a prompt waits there."""

    async def living(self, *, now: bool = False) -> frozenset[str]:
        return frozenset() if self.has_asked.is_set() else frozenset("a")


async def test_where_the_last_prefill_replica_has_gone_nobody_waits_for_the_next(
    opened: Any, model: Any, monkeypatch: pytest.MonkeyPatch
):
    """Serve would hold the call until there is one again."""
    monkeypatch.setattr(worker, "LOOK_S", 0.01)
    async with opened() as local:
        local.decode.worker.prefill = Emptied()
        outputs = await asyncio.wait_for(collect(local, request(PROMPT)), 20)
        assert fallbacks(local) == {("local", "no_prefill"): 1}
    assert ids(outputs) == pop_generate(model, PROMPT, 10, SKIPPED).token_ids


FAILURES = [LeaseLost("gone"), Overloaded("full"), PeerGone("died"), PlanMismatch("other"), "prefill_queue_timeout"]


@pytest.mark.parametrize("failure", FAILURES, ids=str)
async def test_a_failed_hand_off_goes_to_another_replica(opened: Any, model: Any, failure: ShoalError | str):
    async with opened() as local:
        local.decode.worker.prefill = pool = ScriptedPool(local.decode.worker.prefill, failure)
        outputs = await collect(local, request(PROMPT))
        assert fallbacks(local) == {("other_replica", reason_of(failure)): 1}
    assert ids(outputs) == pop_generate(model, PROMPT, 10, SKIPPED).token_ids
    report = outputs[0].handoff
    assert report is not None and report.transferred and report.fallback is None
    first, second = pool.grants
    assert (first.excluded, second.excluded) == (frozenset(), frozenset("a"))
    assert (first.context.attempt, second.context.attempt) == (1, 2) and first.lease_id != second.lease_id


async def test_what_leaves_when_the_engine_has_failed_its_prompt_is_never_read(
    opened: Any, model: Any, monkeypatch: pytest.MonkeyPatch
):
    """Its first chunk waits, its second fails, and another prompt gets the blocks that the first one is read from."""
    failed, may_go, contents = asyncio.Event(), asyncio.Event(), list[bytes]()
    loop, send, run = asyncio.get_running_loop(), PromptClaim.send, Runner.run

    async def send_late(claim: PromptClaim, start: int, end: int, first: int, last: int, rows: Any, *mode: Any) -> None:
        if claim.token_ids == tuple(PROMPT) and not contents:
            contents.append(bytes_of(rows))
            await may_go.wait()
            contents.append(bytes_of(rows))
        await send(claim, start, end, first, last, rows, *mode)

    def fail_once(runner: Runner, plan: Any) -> Any:
        is_second = any(item.start and not item.sequence.sampled for item in plan.rows)
        if is_second and not failed.is_set():
            loop.call_soon_threadsafe(failed.set)
            raise RuntimeError("its second chunk")
        return run(runner, plan)

    monkeypatch.setattr(PromptClaim, "send", send_late)
    monkeypatch.setattr(Runner, "run", fail_once)
    other = [token + 1 for token in PROMPT]
    async with opened(prefill={"max_step_tokens": 16}) as local:
        answer = asyncio.ensure_future(collect(local, request(PROMPT)))
        await asyncio.wait_for(failed.wait(), 10)
        of_other = await collect(local, request(other))
        may_go.set()
        outputs = await answer
        assert fallbacks(local) == {("local", "other"): 1}
    before, after = contents
    assert before != after, "else nothing was shown"
    assert ids(outputs) == pop_generate(model, PROMPT, 10, SKIPPED).token_ids
    assert ids(of_other) == pop_generate(model, other, 10, SKIPPED).token_ids
    assert of_other[0].handoff is not None and of_other[0].handoff.transferred


def bytes_of(rows: KvRows) -> bytes:
    return b"".join(layer[rows.at].tobytes() for layer in rows.layers)


async def test_a_prefill_replica_that_hangs_is_asked_for_no_prompt(opened: Any, model: Any):
    async with opened() as local:
        local.decode.worker.prefill = pool = ScriptedPool(local.decode.worker.prefill, "cancelled", "cancelled")
        pool.unfit = frozenset("a")
        outputs = await collect(local, request(PROMPT))
    assert ids(outputs) == pop_generate(model, PROMPT, 10, SKIPPED).token_ids
    assert [grant.excluded for grant in pool.grants] == [frozenset("a"), frozenset("ab")]


@pytest.mark.parametrize("failure", [FAILURES[0], FAILURES[-1]], ids=str)
async def test_without_another_replica_decode_prefills_at_the_same_depth(
    opened: Any, model: Any, failure: ShoalError | str
):
    async with opened() as local:
        local.decode.worker.prefill = ScriptedPool(None, failure)
        outputs = await collect(local, request(PROMPT))
        assert fallbacks(local) == {("local", reason_of(failure)): 1}
    assert ids(outputs) == pop_generate(model, PROMPT, 10, SKIPPED).token_ids
    report = outputs[0].handoff
    assert report is not None and not report.transferred and report.depth is Depth.SHALLOW
    assert report.fallback == reason_of(failure)


async def test_kv_that_decode_cannot_copy_are_no_prefill_replicas_fault(
    opened: Any, model: Any, monkeypatch: pytest.MonkeyPatch
):
    """Another one's it couldn't, either: it computes the prompt itself at once."""

    async def fails(*_: object) -> int | None:
        raise MemoryError

    async with opened() as local:
        monkeypatch.setattr(PoolSink, "write", fails)
        local.decode.worker.prefill = pool = BothServe(local.decode.worker.prefill)
        outputs = await collect(local, request(PROMPT))
        assert fallbacks(local) == {("local", "other"): 1} and len(pool.grants) == 1
        monkeypatch.undo()
        [again] = (await collect(local, request(PROMPT)))[:1]
    assert ids(outputs) == pop_generate(model, PROMPT, 10, SKIPPED).token_ids
    assert again.handoff is not None and again.handoff.transferred and pool.grants[1].excluded == frozenset()


async def test_the_last_attempt_is_decodes_own(opened: Any, model: Any):
    async with opened() as local:
        local.decode.worker.prefill = pool = ScriptedPool(local.decode.worker.prefill, *FAILURES[:3])
        outputs = await collect(local, request(PROMPT))
        assert fallbacks(local) == {("other_replica", "lease_lost"): 1, ("local", "overloaded"): 1}
    assert len(pool.grants) == 2
    assert ids(outputs) == pop_generate(model, PROMPT, 10, SKIPPED).token_ids


async def test_after_other_decode_replicas_died_the_last_attempt_is_decodes_own(opened: Any, model: Any):
    async with opened() as local:
        local.decode.worker.prefill = pool = ScriptedPool(None, PeerGone("died"))
        outputs = await collect(local, request(PROMPT, attempt=3))
        assert fallbacks(local) == {("local", "last_attempt"): 1}
    assert pool.grants == []
    assert ids(outputs) == pop_generate(model, PROMPT, 10, SKIPPED).token_ids


@pytest.mark.parametrize(
    ("attempt", "handoff"), [(1, {"max_attempts": 1}), (2, {"local": {"per_s": 0.001, "burst": 1}})]
)
async def test_below_the_last_rung_the_request_is_refused_for_now(opened: Any, attempt: int, handoff: dict[str, Any]):
    """There are no more attempts, or decode did it too often of late."""
    async with opened(handoff=handoff) as local:
        local.decode.worker.prefill = ScriptedPool(None, PeerGone("died"))
        if "local" in handoff:
            await collect(local, request(PROMPT, attempt=attempt))
        with pytest.raises(Unavailable, match="try again") as refused:
            await collect(local, request(PROMPT, attempt=attempt))
        assert fallbacks(local)["unavailable", "peer_gone"] == 1
    assert refused.value.retry_after_s is not None and refused.value.retry_after_s >= 1


async def test_what_is_not_handed_over_when_decode_shuts_down_is_for_another_replica(opened: Any):
    """The rungs would end with this process, and a gateway asks no other one for what none could do."""
    async with opened(handoff={"drain_s": 0.01}) as local:
        local.decode.worker.prefill = pool = NobodyAnswers()
        asking = asyncio.create_task(collect(local, request(PROMPT)))
        await pool.has_asked.wait()
        await local.decode.server.drain(0.01)
        with pytest.raises(PeerGone, match="shutting down"):
            await asyncio.wait_for(asking, 10)
        assert fallbacks(local) == {}


async def test_without_a_prefill_replica_nobody_waits_for_one(opened: Any, model: Any):
    async with opened() as local:
        local.decode.worker.prefill = pool = ScriptedPool(None)
        outputs = await collect(local, request(PROMPT))
    assert ids(outputs) == pop_generate(model, PROMPT, 10, SKIPPED).token_ids
    report = outputs[0].handoff
    assert report is not None and report.fallback == "no_prefill" and report.depth is Depth.SHALLOW
    assert pool.grants == []


def fallbacks(local: LocalShoal) -> dict[tuple[str, str], int]:
    """How often each rung was taken, by reason."""
    families = local.decode.registry.collect()
    return {
        (sample.labels["rung"], sample.labels["reason"]): int(sample.value)
        for family in families
        for sample in family.samples
        if sample.name == "shoal_kv_fallback_total"
    }


def reason_of(failure: ShoalError | str) -> str:
    return failure.code if isinstance(failure, ShoalError) else failure


async def test_a_lease_that_nobody_claims_gives_its_blocks_to_an_older_sequence(opened: Any, model: Any):
    """The old one needs more blocks than are free; the young one's lease is never claimed."""
    async with opened(decode={"num_blocks": 12}) as local:
        local.decode.worker.prefill = NobodyAnswers()
        # The engine waits until both are there: alone, the old one would soon have what it needs.
        both_are_here = threading.Event()
        local.decode.engine.post(lambda _: both_are_here.wait(30) and None)
        old = asyncio.create_task(collect(local, request(PROMPT[:8], Depth.FULL, max_tokens=30)))
        asked = asyncio.create_task(collect(local, request(PROMPT, max_tokens=4)))
        for _ in range(20):  # nothing but the engine keeps them from it
            await asyncio.sleep(0)
        both_are_here.set()
        young = await asked
        assert ids(await old) == full_generate(model, PROMPT[:8], 30).token_ids
    report = young[0].handoff
    assert report is not None and report.fallback == "out_of_blocks"
    assert ids(young) == pop_generate(model, PROMPT, 4, SKIPPED).token_ids


async def unclaimed(local: LocalShoal, number: int) -> list[asyncio.Task[list[TokenOutput]]]:
    """So many requests, each of which has a lease that no prefill claims, the last one the youngest."""
    local.decode.worker.prefill = NobodyAnswers()
    asked: list[asyncio.Task[list[TokenOutput]]] = []
    while len(asked) < number:
        asked.append(asyncio.create_task(collect(local, request(PROMPT, max_tokens=4))))
        while local.decode.desk.table.counts.get("reserved", 0) < len(asked):
            await asyncio.sleep(0)
    return asked


@pytest.mark.parametrize("leaves", [False, True])
async def test_leases_give_up_their_blocks_one_at_a_time(opened: Any, model: Any, leaves: bool):
    """Until those of the first one are back, steps that were planned before ask in vain."""
    async with opened() as local:
        worker, table = local.decode.worker, local.decode.desk.table
        asked = await unclaimed(local, 3)
        goes_on = threading.Event()
        local.decode.engine.post(lambda _: goes_on.wait(30) and None)
        worker.told_of_blocks(wanted=True)
        assert table.counts["reserved"] == 2
        if leaves:
            asked[2].cancel()
        else:
            for _ in range(20):  # nothing but the engine keeps it from giving them back
                await asyncio.sleep(0)
        worker.told_of_blocks(wanted=True)
        assert table.counts["reserved"] == 2
        goes_on.set()
        await asyncio.wait(asked[2:])
        worker.told_of_blocks(wanted=True)
        assert table.counts["reserved"] == 1
        await asyncio.wait(asked[1:])
        worker.told_of_blocks(wanted=True)
        answers = await asyncio.gather(*asked[: 3 - leaves])
        assert {ids(answer) for answer in answers} == {pop_generate(model, PROMPT, 4, SKIPPED).token_ids}
        assert asked[2].cancelled() is leaves
        assert fallbacks(local) == {("local", "out_of_blocks"): 3 - leaves}


@pytest.mark.parametrize("num_turns", [0, 1, 3, 7])
async def test_whoever_leaves_while_its_lease_gives_up_its_blocks_keeps_no_other_from_it(opened: Any, num_turns: int):
    """At whichever moment it leaves."""
    async with opened() as local:
        worker = local.decode.worker
        asked = await unclaimed(local, 2)
        worker.told_of_blocks(wanted=True)
        for _ in range(num_turns):
            await asyncio.sleep(0)
        asked[1].cancel()
        await asyncio.wait(asked[1:])
        worker.told_of_blocks(wanted=True)
        report = (await asked[0])[0].handoff
        assert report is not None and report.fallback == "out_of_blocks"


async def test_the_deadline_ends_a_request_that_waits_for_prefill(opened: Any):
    async with opened() as local:
        local.decode.worker.prefill = pool = NobodyAnswers()
        with pytest.raises(DeadlineExceeded):
            await collect(local, request(PROMPT, timeout_s=2.0))
        assert pool.has_asked.is_set()


async def test_what_never_fits_is_refused_and_a_full_queue_says_so(opened: Any):
    async with opened(decode={"max_queued": 2, "max_sequences": 1}) as local:
        with pytest.raises(InvalidRequest, match="KV"):
            await collect(local, request(PROMPT, max_tokens=400))
        asked = [asyncio.create_task(collect(local, request(PROMPT, max_tokens=40))) for _ in range(8)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, Overloaded)]
        assert refused and len(refused) < 8
        assert all(isinstance(answer, list | Overloaded) for answer in answers)


async def test_min_tokens_holds_back_the_end_token(opened: Any, model: Any):
    eos = model.config.eos_token_id
    async with opened() as local:
        hot = [request([1, seed], temperature=5.0, max_tokens=60, seed=seed, ignore_eos=False) for seed in range(2, 30)]
        answers = await asyncio.gather(*(collect(local, one) for one in hot))
        ended = [(one, ids(outputs)) for one, outputs in zip(hot, answers, strict=True) if ids(outputs)[-1] == eos]
        assert ended, "no answer ended by itself: nothing is tested"
        for one, tokens in ended[:3]:
            longer = replace(one, sampling=replace(one.sampling, min_tokens=len(tokens) + 1))
            again = ids(await collect(local, longer))
            assert len(again) > len(tokens) and eos not in again[: len(tokens)]
