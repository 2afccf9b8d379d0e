"""A prompt is asked for twice, by decode's session and by its call: it's computed once, whichever comes first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import save_tiny
from reference import pop_generate
from structlog.testing import capture_logs

from shoal.cluster.local import LocalShoal, OneReplica, open_local
from shoal.cluster.prefill_replica import PrefillReplica
from shoal.config import load_config
from shoal.engine.engine import Engine
from shoal.errors import Cancelled, LeaseLost, Overloaded, PeerGone, PlanMismatch, ShoalError, Unavailable
from shoal.handoff.prefill_side import PromptClaim
from shoal.handoff.session import Session
from shoal.handoff.session_pool import SessionPool
from shoal.prefill import worker
from shoal.wire.handoff_messages import Accepted, Failed, Frame, Grant, HandoffOutcome
from shoal.wire.messages import Depth, GenerateRequest, RequestContext, SamplingParams

pytestmark = pytest.mark.usefixtures("model")

SKIPPED = 2
PROMPT = tuple(range(3, 25))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return save_tiny(folder, dtype=torch.float32, layers=4)


class Asked(OneReplica):
    """Asks as a decode replica does: by the session first, and by a call as soon as ``may_call`` is set."""

    def __init__(self, local: LocalShoal) -> None:
        super().__init__(local.prefill)
        self._local = local
        self.may_call = asyncio.Event()
        self.outcomes: list[HandoffOutcome] = []
        self.grants: list[Grant] = []

    async def ask(self, grant: Grant) -> HandoffOutcome:
        self.grants.append(grant)
        await self._local.decode.server.grant(grant, self._local.prefill.key, 0.0)
        await self.may_call.wait()
        outcome = await super().ask(grant)
        self.outcomes.append(outcome)
        return outcome


@asynccontextmanager
async def asked(folder: Path, **handoff: object) -> AsyncIterator[tuple[LocalShoal, Asked]]:
    """Both stages, and the session between them, which there is as soon as they greet."""
    stage = {"num_blocks": 64, "block_tokens": 4, "max_step_tokens": 8, "num_threads": 1}
    model = {"name": str(folder), "skip_layers": SKIPPED, "dtype": "float32"}
    async with open_local(load_config(model=model, prefill=stage, decode=stage, handoff=handoff)) as local:
        await local.prefill.sessions.greet(["memory"], within_s=10)
        local.decode.worker.prefill = pool = Asked(local)
        yield local, pool
        await settled(local)
        # But for what a late call may ask for.
        left = local.prefill.worker._begun.values()
        assert all(begun.task.done() and begun.has_claimed and not begun.is_called_for for begun in left)


async def settled(local: LocalShoal) -> None:
    """All blocks are back; a lease ends a moment after its request."""
    await asyncio.wait_for(local.decode.desk.idle.wait(), 10)
    for stage in (local.prefill, local.decode):
        async with asyncio.timeout(10):
            while (counts := await stage.counts()).num_free_blocks != counts.num_blocks:
                pass


async def answer(local: LocalShoal) -> tuple[int, ...]:
    sampling = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    request = GenerateRequest(RequestContext("test", 30.0), "tiny", PROMPT, Depth.SHALLOW, sampling)
    return tuple([token async for output in local.decode.worker.generate(request) for token in output.token_ids])


def num_granted(local: LocalShoal, way: str) -> float | None:
    return local.prefill.registry.get_sample_value("shoal_prefill_grants_total", {"way": way})


async def test_a_prompt_is_answered_though_its_call_never_comes(model: Any, folder: Path):
    async with asked(folder) as (local, pool):
        assert await answer(local) == pop_generate(model, PROMPT, 6, SKIPPED).token_ids
        assert (num_granted(local, "session"), num_granted(local, "call")) == (1, 0)
        pool.may_call.set()  # it comes when all is over, and hears how that was
        [call] = local.decode.worker._calls
        assert await call == HandoffOutcome(pool.grants[0].lease_id, committed=True)
        assert num_granted(local, "call") == 0
        assert (await local.prefill.counts()).num_waiting == 0


async def test_a_call_that_waits_on_when_all_is_over_is_given_up(folder: Path):
    async with asked(folder) as (local, _pool):
        local.decode.worker._config = local.decode.worker._config.model_copy(update={"ttl_s": 0.05})
        await answer(local)
        [call] = local.decode.worker._calls
        await asyncio.wait_for(asyncio.wait([call]), 10)
        assert call.cancelled() and not local.decode.worker._calls


async def test_what_a_call_never_asked_for_is_forgotten_some_time_later(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(worker, "KEPT_S", 0.01)
    async with asked(folder) as (local, _pool):
        await answer(local)
        assert num_granted(local, "session") == 1
        async with asyncio.timeout(10):
            while local.prefill.worker._begun:
                await asyncio.sleep(0.01)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What is computed leaves when ``may_send`` is set; ``claimed`` says that something is there."""
    late, send = SimpleNamespace(claimed=asyncio.Event(), may_send=asyncio.Event()), PromptClaim.send

    async def send_late(claim: PromptClaim, *values: Any) -> None:
        late.claimed.set()
        await late.may_send.wait()
        await send(claim, *values)

    monkeypatch.setattr(PromptClaim, "send", send_late)
    return late


async def test_a_call_that_comes_meanwhile_joins_what_has_begun(model: Any, folder: Path, late: SimpleNamespace):
    async with asked(folder) as (local, pool):
        whole = asyncio.ensure_future(answer(local))
        await asyncio.wait_for(late.claimed.wait(), 10)
        pool.may_call.set()
        [call] = await called_for(local)
        await local.decode.server.grant(pool.grants[0], local.prefill.key, 0.0)  # a frame may arrive twice
        late.may_send.set()
        assert await whole == pop_generate(model, PROMPT, 6, SKIPPED).token_ids
        await call
        assert [outcome.committed for outcome in pool.outcomes] == [True]
        assert (num_granted(local, "session"), num_granted(local, "call")) == (1, 0)


async def called_for(local: LocalShoal) -> list[asyncio.Task[HandoffOutcome]]:
    async with asyncio.timeout(10):
        while not all(begun.is_called_for for begun in local.prefill.worker._begun.values()):
            await asyncio.sleep(0)
    return [begun.task for begun in local.prefill.worker._begun.values()]


async def test_a_call_that_comes_first_needs_no_session(model: Any, folder: Path):
    async with asked(folder) as (local, _pool):
        local.decode.worker.prefill = OneReplica(local.prefill)
        assert await answer(local) == pop_generate(model, PROMPT, 6, SKIPPED).token_ids
        assert (num_granted(local, "session"), num_granted(local, "call")) == (0, 1)


async def test_who_gives_its_call_up_ends_what_the_session_has_begun(folder: Path, monkeypatch: pytest.MonkeyPatch):
    claimed = asyncio.Event()

    async def never_send(_claim: PromptClaim, *_values: Any) -> None:
        claimed.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(PromptClaim, "send", never_send)
    async with asked(folder) as (local, pool):
        pool.may_call.set()
        whole = asyncio.ensure_future(answer(local))
        await asyncio.wait_for(claimed.wait(), 10)
        [task] = await called_for(local)
        whole.cancel()
        await asyncio.wait([whole, task])
        assert whole.cancelled() and task.cancelled()


async def test_what_could_not_begin_is_tried_again_by_its_call(
    model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    refused, submit = asyncio.Event(), Engine.submit_prefill
    loop = asyncio.get_running_loop()

    def refuse_once(engine: Engine, *values: Any, **more: Any) -> None:
        if refused.is_set():
            submit(engine, *values, **more)
        else:
            loop.call_soon_threadsafe(refused.set)
            raise Overloaded("just now")

    async with asked(folder) as (local, pool):
        monkeypatch.setattr(Engine, "submit_prefill", refuse_once)
        whole = asyncio.ensure_future(answer(local))
        await asyncio.wait_for(refused.wait(), 10)
        async with asyncio.timeout(10):
            while local.prefill.worker._begun:
                await asyncio.sleep(0)
        pool.may_call.set()
        assert await whole == pop_generate(model, PROMPT, 6, SKIPPED).token_ids
        assert (num_granted(local, "session"), num_granted(local, "call")) == (1, 1)


async def test_a_grant_that_decode_no_longer_knows_costs_no_more_than_its_claim(folder: Path):
    async with asked(folder) as (local, _pool):
        local.prefill.worker.begin(grant(local))
        [begun] = local.prefill.worker._begun.values()
        outcome = await asyncio.wait_for(begun.task, 10)
        assert (outcome.committed, outcome.reason) == (False, LeaseLost.code)


async def test_a_grant_for_another_plan_says_so_to_its_call_alone(folder: Path):
    async with asked(folder) as (local, _pool):
        local.prefill.worker.begin(grant(local, plan_hash="another"))
        [begun] = local.prefill.worker._begun.values()
        await asyncio.wait([begun.task])
        with pytest.raises(PlanMismatch, match="not another"):
            await local.prefill.worker.prefill(grant(local, plan_hash="another"))
        plan, _, model = local.prefill.served.plan_hash.partition("@")
        for other, differs in ((f"{plan}@other", "models"), (f"other@{model}", "plans")):
            with pytest.raises(PlanMismatch, match=f"the {differs} differ"):
                await local.prefill.worker.prefill(grant(local, plan_hash=other))


@pytest.mark.parametrize("is_called", [True, False])
async def test_what_is_not_called_for_in_time_and_has_claimed_nothing_leaves_the_queue(
    folder: Path, monkeypatch: pytest.MonkeyPatch, is_called: bool
):
    asks, may_get, get = asyncio.Event(), asyncio.Event(), SessionPool.get

    async def get_late(pool: SessionPool, address: str) -> Any:
        asks.set()
        await may_get.wait()
        return await get(pool, address)

    async with asked(folder) as (local, _pool):
        monkeypatch.setattr(SessionPool, "get", get_late)
        if not is_called:
            monkeypatch.setattr(worker, "CALL_WITHIN_S", 0.05)
        local.prefill.worker.begin(grant(local))
        [begun] = local.prefill.worker._begun.values()
        await asyncio.wait_for(asks.wait(), 10)
        if is_called:
            call = asyncio.ensure_future(local.prefill.worker.prefill(grant(local)))
            await asyncio.sleep(0)
            assert begun.overdue is not None and begun.overdue.cancelled()
            may_get.set()
            assert (await call).reason == LeaseLost.code
        else:
            await asyncio.wait([begun.task])
            assert begun.task.cancelled()


async def test_what_claims_its_lease_is_wanted_as_long_as_that_is(
    model: Any, folder: Path, late: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    """Also before the answer to the claim has come: to decode it's claimed by then."""
    post = Session.post

    def post_late(session: Session, frame: Frame, *written: Any) -> None:
        if isinstance(frame, Accepted):
            [begun] = local.prefill.worker._begun.values()
            assert begun.overdue is not None and not begun.has_claimed
            if not begun.overdue.cancelled():
                begun.overdue._run()  # type: ignore[attr-defined]  # as when its time has come
        post(session, frame, *written)

    async with asked(folder) as (local, pool):
        monkeypatch.setattr(Session, "post", post_late)
        whole = asyncio.ensure_future(answer(local))
        await asyncio.wait_for(late.claimed.wait(), 10)
        [begun] = local.prefill.worker._begun.values()
        assert begun.overdue is not None and begun.overdue.cancelled()
        late.may_send.set()
        assert await whole == pop_generate(model, PROMPT, 6, SKIPPED).token_ids
        assert not num_fallbacks(local)
        pool.may_call.set()


async def test_a_defect_that_no_call_hears_of_is_logged(folder: Path, monkeypatch: pytest.MonkeyPatch):
    async def break_down(_pool: SessionPool, _address: str) -> None:
        raise RuntimeError("a defect")

    async with asked(folder) as (local, _pool):
        monkeypatch.setattr(SessionPool, "get", break_down)
        with capture_logs() as logs:
            local.prefill.worker.begin(grant(local))
            [begun] = local.prefill.worker._begun.values()
            await asyncio.wait([begun.task])
        assert [log["event"] for log in logs if log["log_level"] == "error"] == [
            "a prompt that no call waits for failed"
        ]
        with pytest.raises(RuntimeError, match="a defect"), capture_logs() as logs:
            await local.prefill.worker.prefill(grant(local))
        assert not any(log["log_level"] == "error" for log in logs)  # who called hears of it


class Elsewhere(Asked):
    """Grants a prompt by the session; its call goes to a replica that ``ends`` it, when the lease is claimed."""

    def __init__(self, local: LocalShoal, end: HandoffOutcome | ShoalError) -> None:
        super().__init__(local)
        self._end = end

    async def ask(self, grant: Grant) -> HandoffOutcome:
        if self.grants:
            return await OneReplica.ask(self, grant)  # the next rung
        self.grants.append(grant)
        assert await self._local.decode.server.grant(grant, self._local.prefill.key, 60)
        if isinstance(self._end, ShoalError):
            raise self._end
        return replace(self._end, lease_id=grant.lease_id)


async def test_a_call_that_comes_as_it_is_given_up_begins_anew(folder: Path, monkeypatch: pytest.MonkeyPatch):
    asks, get = asyncio.Event(), SessionPool.get

    async def wait_once(pool: SessionPool, address: str) -> Any:
        if not asks.is_set():
            asks.set()
            await asyncio.Event().wait()
        return await get(pool, address)

    async with asked(folder) as (local, _pool):
        monkeypatch.setattr(SessionPool, "get", wait_once)
        local.prefill.worker.begin(grant(local))
        [begun] = local.prefill.worker._begun.values()
        await asyncio.wait_for(asks.wait(), 10)
        assert begun.overdue is not None
        begun.overdue._run()  # type: ignore[attr-defined]  # as when its time has come
        outcome = await local.prefill.worker.prefill(grant(local))
        assert outcome.reason == LeaseLost.code and begun.task.cancelled()
        assert (num_granted(local, "session"), num_granted(local, "call")) == (1, 1)


REFUSED = HandoffOutcome(bytes(16), committed=False, reason=LeaseLost.code)
NONE_THERE = Unavailable("no replica to call")
GONE = PeerGone("the replica that was called has died")


@pytest.mark.parametrize(
    "end", [REFUSED, NONE_THERE, GONE], ids=["another was called", "nobody was called", "another has died"]
)
async def test_wherever_serve_brings_the_call_who_has_claimed_the_prompt_finishes_it(
    model: Any, folder: Path, end: HandoffOutcome | ShoalError
):
    async with asked(folder) as (local, _pool):
        local.decode.worker.prefill = pool = Elsewhere(local, end)
        assert await answer(local) == pop_generate(model, PROMPT, 6, SKIPPED).token_ids
        assert len(pool.grants) == 1 and not num_fallbacks(local)


class Miscounting(Asked):
    """Grants one token more than the prompt has."""

    async def ask(self, grant: Grant) -> HandoffOutcome:
        return await super().ask(replace(grant, num_prompt_tokens=grant.num_prompt_tokens + 1))


async def test_a_prompt_of_another_length_than_was_granted_is_not_computed_by_prefill(model: Any, folder: Path):
    async with asked(folder) as (local, _pool):
        local.decode.worker.prefill = pool = Miscounting(local)
        pool.may_call.set()
        assert await answer(local) == pop_generate(model, PROMPT, 6, SKIPPED).token_ids
        assert [(outcome.committed, outcome.reason) for outcome in pool.outcomes] == [(False, LeaseLost.code)]
        assert num_fallbacks(local) == 1


@pytest.mark.parametrize("end", [replace(REFUSED, had_claim=True), GONE], ids=["it has given up", "nothing is heard"])
async def test_who_has_claimed_a_prompt_and_gives_up_or_is_lost_is_not_waited_for(
    model: Any, folder: Path, end: HandoffOutcome | ShoalError, monkeypatch: pytest.MonkeyPatch
):
    sends, send = asyncio.Event(), PromptClaim.send

    async def never_send(claim: PromptClaim, *values: Any) -> None:
        if not sends.is_set():
            sends.set()
            await claim.cancelled.wait()
            raise Cancelled("decode doesn't wait")
        await send(claim, *values)

    monkeypatch.setattr(PromptClaim, "send", never_send)
    async with asked(folder) as (local, _pool):
        local.decode.worker._config = local.decode.worker._config.model_copy(update={"ttl_s": 0.1})
        local.decode.worker.prefill = Elsewhere(local, end)
        assert await answer(local) == pop_generate(model, PROMPT, 6, SKIPPED).token_ids
        assert num_fallbacks(local) == 1


async def test_a_lease_whose_claim_was_answered_to_nobody_ends_and_the_prompt_goes_another_way(
    model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Lost are the answer to the claim, and then that prefill waits for it no more: to decode it's claimed."""
    lost, post = [Accepted, Failed], Session.post

    def lose(session: Session, frame: Frame, *written: Any) -> None:
        if type(frame) in lost:
            lost.remove(type(frame))
        else:
            post(session, frame, *written)

    monkeypatch.setattr(Session, "post", lose)
    async with asked(folder, ttl_s=1.0) as (local, pool):
        pool.may_call.set()
        assert await answer(local) == pop_generate(model, PROMPT, 6, SKIPPED).token_ids
        assert num_fallbacks(local) == 1 and not lost


@pytest.mark.parametrize("is_healthy", [True, False])
def test_a_replica_that_is_not_healthy_begins_nothing_by_a_session(is_healthy: bool):
    def require_healthy() -> None:
        if not is_healthy:
            raise PeerGone("it soon won't be there")

    begun: list[object] = []
    stage = SimpleNamespace(worker=SimpleNamespace(begin=begun.append))
    replica: Any = SimpleNamespace(_watch=SimpleNamespace(require_healthy=require_healthy), _stage=stage)
    PrefillReplica._begin(replica, "a grant")  # type: ignore[arg-type]
    assert begun == (["a grant"] if is_healthy else [])


def num_fallbacks(local: LocalShoal) -> float:
    samples = [sample for metric in local.decode.registry.collect() for sample in metric.samples]
    return sum(sample.value for sample in samples if sample.name == "shoal_kv_fallback_total")


async def test_what_nobody_called_for_ends_with_its_stage(folder: Path, monkeypatch: pytest.MonkeyPatch):
    waits = asyncio.Event()

    async def never(_pool: SessionPool, _address: str) -> None:
        waits.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(SessionPool, "get", never)
    async with open_local(
        load_config(model={"name": str(folder), "skip_layers": SKIPPED, "dtype": "float32"})
    ) as local:
        local.prefill.worker.begin(grant(local))
        [begun] = local.prefill.worker._begun.values()
        await asyncio.wait_for(waits.wait(), 10)
    assert begun.task.cancelled() and not local.prefill.worker._begun


def grant(local: LocalShoal, plan_hash: str | None = None) -> Grant:
    """Of a lease that there isn't."""
    plan_hash = local.prefill.served.plan_hash if plan_hash is None else plan_hash
    return Grant(bytes(16), "memory", plan_hash, len(PROMPT), 0, 5.0, 30.0, RequestContext("gone", 30.0))
