"""Decode between the gateway and the prefill pool: what either gives up stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from token_streams import Joined, generate_request, joined, output

from shoal.cluster import routes
from shoal.cluster.decode_replica import DecodeReplica, ServePrefillPool
from shoal.cluster.directory import Entry
from shoal.errors import InternalError, PeerGone, ShoalError
from shoal.wire.handoff_messages import Grant, HandoffOutcome
from shoal.wire.messages import GenerateRequest, RequestContext, TokenOutput
from shoal.wire.token_client import TokenStream

GRANT = Grant(b"1" * 16, "127.0.0.1:1", "plan", 3, 0, 5.0, 30.0, RequestContext("one", timeout_s=1))
OUTCOME = HandoffOutcome(GRANT.lease_id, committed=True)
KEY = bytes(range(16))


class Prefill:
    """What Serve's handle gives: ``outcome``, or ``error``, once it's there."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.asked: list[Grant] = []
        self.is_cancelled = False
        self.is_done = asyncio.Event()
        self._error = error

    @property
    def prefill(self) -> Any:
        return self

    def remote(self, grant: Grant) -> Prefill:
        self.asked.append(grant)
        return self

    def __await__(self) -> Generator[Any, None, HandoffOutcome]:
        return self._answer().__await__()

    async def _answer(self) -> HandoffOutcome:
        if self._error is not None:
            raise self._error
        await self.is_done.wait()
        return OUTCOME

    def cancel(self) -> None:
        self.is_cancelled = True


class Server:
    """Grants by session: remembers to whom, and returns when ``is_claimed``, or at once unless it ``is_patient``."""

    def __init__(self, *, has_session: bool = True, is_patient: bool = True) -> None:
        self._is_patient = is_patient
        self.granted: list[tuple[Grant, bytes]] = []
        self.is_claimed = asyncio.Event()
        self.claimants: dict[bytes, bytes] = {}
        self._has_session = has_session

    async def grant(self, grant: Grant, key: bytes, patience_s: float) -> bool | None:
        assert 0 < patience_s < 0.1
        self.granted.append((grant, key))
        if not self._has_session:
            return None
        if self._is_patient:
            await self.is_claimed.wait()
            self.claimants[grant.lease_id] = key
        return self._is_patient

    def claimant(self, lease_id: bytes) -> bytes:
        return self.claimants.get(lease_id, b"")


@pytest.fixture
def pick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router's choice is ``a``."""

    def pick_a(call: Grant) -> str:
        routes.choose(call, "a")
        return "a"

    monkeypatch.setattr(routes, "_pickers", [pick_a])


def entries(**keys: bytes) -> dict[str, Entry]:
    return {one: Entry("shoal", "prefill", one, one, "node", 1, "", key=key.hex()) for one, key in keys.items()}


def granting(prefill: Prefill, server: Server | None) -> ServePrefillPool:
    found = pool(prefill)
    found.server = server  # type: ignore[assignment]
    found._living._entries = entries(a=KEY, b=bytes(16))
    return found


@pytest.mark.usefixtures("pick")
async def test_a_prompt_is_granted_by_the_session_first_and_serve_s_call_follows_the_claim():
    prefill, server, grant = Prefill(), Server(), replace(GRANT, lease_id=b"3" * 16)
    asked = granting(prefill, server)
    call = asyncio.ensure_future(asked.ask(grant))
    while not server.granted:
        await asyncio.sleep(0)
    assert server.granted == [(grant, KEY)] and not prefill.asked
    assert asked.asked(grant) == "a"
    server.is_claimed.set()
    while not prefill.asked:
        await asyncio.sleep(0)
    assert asked.asked(grant) == "a"  # also while Serve hasn't said where the call went
    prefill.is_done.set()
    assert await call == OUTCOME and prefill.asked == [grant]


@pytest.mark.parametrize(("is_claimed", "blamed"), [(True, "a"), (False, "b")])
@pytest.mark.usefixtures("pick")
async def test_who_has_claimed_a_prompt_is_blamed_for_it_wherever_its_call_went(is_claimed: bool, blamed: str):
    prefill, server, grant = Prefill(), Server(is_patient=is_claimed), replace(GRANT, lease_id=b"5" * 16)
    asked = granting(prefill, server)
    server.is_claimed.set()
    call = asyncio.ensure_future(asked.ask(grant))
    while not prefill.asked:
        await asyncio.sleep(0)
    routes.note(grant, "b")
    assert asked.asked(grant) == blamed
    server.claimants[grant.lease_id] = KEY  # later than it was waited for
    assert asked.asked(grant) == "a"
    asked._living._entries = entries(b=bytes(16))
    assert asked.asked(grant) == "a", "also once it hangs, or is gone"
    prefill.is_done.set()
    assert await call == OUTCOME


@pytest.mark.usefixtures("pick")
async def test_who_gives_up_before_serve_is_called_has_called_nobody_and_counts_no_more():
    prefill, server, grant = Prefill(), Server(), replace(GRANT, lease_id=b"2" * 16)
    before = routes.num_chosen()["a"]
    call = asyncio.ensure_future(granting(prefill, server).ask(grant))
    while not server.granted:
        await asyncio.sleep(0)
    assert routes.num_chosen()["a"] == before + 1
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert not prefill.asked and routes.num_chosen()["a"] == before


@pytest.mark.parametrize("server", [None, Server(has_session=False)], ids=["no server", "no session"])
@pytest.mark.usefixtures("pick")
async def test_where_there_is_no_session_to_grant_it_by_serve_is_called_at_once(server: Server | None):
    prefill, grant = Prefill(), replace(GRANT, lease_id=b"4" * 16)
    prefill.is_done.set()
    asked = granting(prefill, server)
    assert await asked.ask(grant) == OUTCOME and prefill.asked == [grant]
    assert asked.asked(grant) is None  # as long as Serve doesn't say


async def test_where_nobody_is_picked_nobody_has_the_key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(routes, "_pickers", [])
    prefill, server = Prefill(), Server(has_session=False)
    prefill.is_done.set()
    assert await granting(prefill, server).ask(GRANT) == OUTCOME
    assert not server.granted


def pool(prefill: Prefill) -> ServePrefillPool:
    return ServePrefillPool("shoal", prefill)  # type: ignore[arg-type]


async def test_the_outcome_comes_back_and_nothing_is_cancelled() -> None:
    prefill, grant = Prefill(), replace(GRANT, lease_id=b"2" * 16)
    asking = asyncio.create_task(pool(prefill).ask(grant))
    await asyncio.sleep(0)
    routes.note(grant, "a")  # as Serve's router does
    assert routes.num_chosen()["a"] == 1
    prefill.is_done.set()
    assert await asking == OUTCOME
    assert (prefill.asked, prefill.is_cancelled) == ([grant], False)
    assert not routes.num_chosen()["a"]  # though we hold the grant yet


async def test_who_stops_waiting_cancels_the_replicas_work() -> None:
    prefill = Prefill()
    asking = asyncio.create_task(pool(prefill).ask(GRANT))
    await asyncio.sleep(0)
    assert prefill.asked == [GRANT] and not prefill.is_cancelled
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert prefill.is_cancelled


@pytest.mark.parametrize(
    "error",
    [
        ActorDiedError(),
        TaskCancelledError(),
        asyncio.CancelledError(),  # as Serve's handle tells of the same
        BackPressureError(1, 1),
        DeploymentUnavailableError(None),  # type: ignore[arg-type]
    ],
    ids=lambda error: type(error).__name__,
)
async def test_an_error_of_rays_own_means_that_the_replica_went_away(error: BaseException) -> None:
    with pytest.raises(PeerGone, match="the prefill replica went away") as gone:
        await pool(Prefill(error)).ask(GRANT)
    assert gone.value.__cause__ is error


async def test_what_the_replica_raised_is_raised_as_it_was() -> None:
    raised: ShoalError = InternalError("a defect")
    with pytest.raises(InternalError) as caught:
        await pool(Prefill(RayTaskError("prefill", "traceback", raised))).ask(GRANT)
    assert caught.value is raised


async def test_a_defect_of_the_replica_s_is_an_internal_error() -> None:
    defect = RayTaskError("prefill", "traceback", ZeroDivisionError("secret"))
    with pytest.raises(InternalError, match="the prefill replica failed"):
        await pool(Prefill(defect)).ask(GRANT)


class Worker:
    """It answers with ``outputs``, or ``waits`` for ever."""

    def __init__(self, *outputs: TokenOutput, waits: bool = False) -> None:
        self.came: list[GenerateRequest] = []
        self.is_open = False
        self.has_begun = asyncio.Event()
        self._waits = waits
        self._outputs = outputs

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenOutput]:
        self.came.append(request)
        self.is_open = True
        self.has_begun.set()
        try:
            if self._waits:
                await asyncio.Event().wait()
            for one in self._outputs:
                yield one
        finally:
            self.is_open = False


def replica(worker: Worker) -> DecodeReplica:
    """With no more of one than an answer needs."""
    own: Any = SimpleNamespace(
        _stage=SimpleNamespace(worker=worker), _watch=SimpleNamespace(require_healthy=lambda: None)
    )
    return own


@asynccontextmanager
async def answered_by(worker: Worker) -> AsyncIterator[tuple[Joined, TokenStream, asyncio.Task[None]]]:
    async with joined(answer=partial(DecodeReplica._answer, replica(worker))) as both:
        stream, call = both.open()
        yield both, stream, call


async def test_what_a_gateway_brings_is_answered() -> None:
    worker = Worker(output(1), output(2))
    async with answered_by(worker) as (_both, stream, _call):
        assert [one async for one in stream] == [output(1), output(2)]
    assert worker.came == [generate_request(1)]


@pytest.mark.parametrize("who", ["call", "gateway", "decode"])
async def test_a_request_without_an_output_ends_with_its_gateway(who: str) -> None:
    """It may wait for blocks, for prefill, for its turn."""
    worker = Worker(waits=True)
    async with answered_by(worker) as (both, _stream, call), asyncio.timeout(10):
        await worker.has_begun.wait()
        if who == "call":
            call.cancel()
        elif who == "gateway":
            await both.client.close()
        else:
            both.decode.tokens.close()
        while worker.is_open or both.decode.tokens.num_gateways > (who == "call"):
            await asyncio.sleep(0)
