"""The prefill pool through its Serve handle: what decode gives up stops there, too."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from shoal.decode.deployment import ServePrefillPool
from shoal.errors import InternalError, PeerGone, ShoalError
from shoal.messages import Grant, HandoffOutcome, RequestContext

GRANT = Grant(b"1" * 16, "127.0.0.1:1", "plan", 3, 0, 5.0, 30.0, RequestContext("one", timeout_s=1))
OUTCOME = HandoffOutcome(GRANT.lease_id, committed=True)


class Prefill:
    """What Serve's handle gives: ``outcome``, or ``error``, once it's there."""

    def __init__(self, error: Exception | None = None) -> None:
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


def pool(prefill: Prefill) -> ServePrefillPool:
    return ServePrefillPool("shoal", prefill)  # type: ignore[arg-type]


async def test_the_outcome_comes_back_and_nothing_is_cancelled() -> None:
    prefill = Prefill()
    prefill.is_done.set()
    assert await pool(prefill).ask(GRANT) == OUTCOME
    assert (prefill.asked, prefill.is_cancelled) == ([GRANT], False)


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
        BackPressureError(1, 1),
        DeploymentUnavailableError(None),  # type: ignore[arg-type]
    ],
    ids=lambda error: type(error).__name__,
)
async def test_an_error_of_rays_own_means_that_the_replica_went_away(error: Exception) -> None:
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
