"""One prefill replica without Ray: an engine over the kept layers, and sessions to the decode replicas.

A prompt is asked for twice, by decode's session and, some milliseconds later, by its call through Serve, which returns
when all is over: what comes first begins. A prompt's way: hold blocks for all of it, claim its lease, compute chunk by
chunk while the last one is on the wire, seal, and keep the blocks until decode has committed.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from functools import partial

import structlog
import torch

from shoal.config.rate import TOLD, RateLimit
from shoal.engine.client import ChunkComputed, EngineClient, Inbox
from shoal.engine.runner import PrefillChunk
from shoal.errors import Cancelled, DeadlineExceeded, InternalError, LeaseLost, PlanMismatch, ShoalError
from shoal.handoff.prefill_side import PromptClaim
from shoal.handoff.session_pool import SessionPool
from shoal.model.kv_rows import KvRows
from shoal.model.plan import LayerPlan, short_name, what_differs
from shoal.telemetry import PrefillMetrics, bind_request
from shoal.telemetry.labels import GrantWay
from shoal.wire.handoff_messages import Grant, HandoffOutcome
from shoal.wire.messages import Depth

_log = structlog.get_logger(__name__)

# A prompt that decode asked for by its session is called for some milliseconds later. If it isn't, and doesn't claim
# its lease yet, nobody waits for it: it leaves the queue.
CALL_WITHIN_S = 2.0
# How long it's remembered how one ended that had claimed its lease, for a call that comes after.
KEPT_S = 30.0


@dataclass(slots=True, eq=False)
class _Begun:
    """A prompt that is computed, or waits for it."""

    task: asyncio.Task[HandoffOutcome] = field(init=False)
    overdue: asyncio.TimerHandle | None = None
    is_called_for: bool = False
    has_claimed: bool = False


class PrefillWorker:
    """Serves exactly the plan that its weights allow."""

    def __init__(
        self, engine: EngineClient, sessions: SessionPool, *, plan: LayerPlan, plan_hash: str, metrics: PrefillMetrics
    ) -> None:
        self._engine = engine
        self._sessions = sessions
        self._plan_hash = plan_hash
        self._num_kept = plan.num_kept
        self._depth = Depth.SHALLOW if plan.num_skipped else Depth.FULL
        self._metrics = metrics
        self._told = RateLimit(TOLD)
        self._begun: dict[bytes, _Begun] = {}

    async def prefill(self, grant: Grant) -> HandoffOutcome:
        """Compute and ship one prompt, unless that has begun. Returns when its lease has ended, however it ended.

        Raises Overloaded before anything is claimed, PlanMismatch for another plan. To cancel it ends the work.
        """
        begun = self._begun.get(grant.lease_id)
        if begun is not None and begun.task.cancelling():  # it was overdue, just now
            await asyncio.wait([begun.task])
            begun = None
        if begun is None:
            begun = self._begin(grant, GrantWay.CALL)
        begun.is_called_for = True
        if begun.overdue is not None:
            begun.overdue.cancel()
        try:
            return await begun.task
        finally:
            self._forget(grant, begun)

    def begin(self, grant: Grant) -> None:
        """Begin with a prompt that ``prefill`` will be called for, unless it has begun."""
        if grant.lease_id not in self._begun:
            begun = self._begin(grant, GrantWay.SESSION)
            begun.overdue = asyncio.get_running_loop().call_later(CALL_WITHIN_S, begun.task.cancel)

    async def close(self) -> None:
        """End all that goes on."""
        tasks = [begun.task for begun in self._begun.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, grant: Grant, way: GrantWay) -> _Begun:
        self._metrics.granted(way)
        begun = _Begun()
        with bind_request(grant.context.request_id):
            begun.task = asyncio.get_running_loop().create_task(self._run(grant, begun))
        self._begun[grant.lease_id] = begun
        begun.task.add_done_callback(partial(self._ended, grant, begun))
        return begun

    def _ended(self, grant: Grant, begun: _Begun, task: asyncio.Task[HandoffOutcome]) -> None:
        """A short prompt may be over before it's called for; where it couldn't even claim its lease, the call tries
        again, and says why."""
        if begun.overdue is not None:
            begun.overdue.cancel()
        error = None if task.cancelled() else task.exception()
        if begun.is_called_for:
            return  # which forgets it
        if error is not None and not isinstance(error, ShoalError):
            _log.error("a prompt that no call waits for failed", exc_info=error)
        if begun.has_claimed:
            asyncio.get_running_loop().call_later(KEPT_S, self._forget, grant, begun)
        else:
            self._forget(grant, begun)

    def _forget(self, grant: Grant, begun: _Begun) -> None:
        if self._begun.get(grant.lease_id) is begun:
            del self._begun[grant.lease_id]

    async def _run(self, grant: Grant, begun: _Begun) -> HandoffOutcome:
        if grant.plan_hash != self._plan_hash:
            raise PlanMismatch(
                f"this prefill replica runs plan {short_name(self._plan_hash)}, not {short_name(grant.plan_hash)}: "
                + what_differs((self._plan_hash,), (grant.plan_hash,))
            )
        request_id = grant.lease_id.hex()
        with self._engine.open(request_id) as inbox:
            asked_s = time.monotonic()
            context = grant.context
            await self._engine.call(
                lambda engine: engine.submit_prefill(
                    request_id, grant.num_prompt_tokens, tenant=context.tenant, timeout_s=context.timeout_s
                )
            )
            deadline = asyncio.timeout(context.timeout_s)
            try:
                async with deadline:  # decode ends it then, too; but decode may be gone
                    async with asyncio.timeout(grant.claim_timeout_s):
                        await inbox.reserved()
                    await self._hand_off(grant, begun, inbox, time.monotonic() - asked_s)
            except TimeoutError:
                reason = DeadlineExceeded.code if deadline.expired() else "prefill_queue_timeout"
                self._tell(grant, reason)
                return HandoffOutcome(grant.lease_id, committed=False, reason=reason, had_claim=begun.has_claimed)
            except ShoalError as error:
                if not isinstance(error, Cancelled):  # decode wants it no more
                    self._tell(grant, error.code, error)
                return HandoffOutcome(grant.lease_id, committed=False, reason=error.code, had_claim=begun.has_claimed)
        return HandoffOutcome(grant.lease_id, committed=True)

    async def _hand_off(self, grant: Grant, begun: _Begun, inbox: Inbox, waited_s: float) -> None:
        session = await self._sessions.get(grant.handoff_address)
        if begun.overdue is not None:
            begun.overdue.cancel()  # from now on its lease says whether it's wanted
        async with session.claim(grant.lease_id) as claim:
            begun.has_claimed = True
            if len(claim.token_ids) != grant.num_prompt_tokens:
                raise LeaseLost(f"granted {grant.num_prompt_tokens} tokens, the claim brought {len(claim.token_ids)}")
            started_s = time.monotonic()
            await self._engine.call(
                lambda engine: engine.start_shipping(
                    inbox.request_id, claim.token_ids, num_present=claim.num_present, wire_mode=claim.wire_mode
                )
            )
            # Held until decode has committed: to give so much memory back takes longer than to send a frame.
            last = await self._ship(claim, inbox)
            queue_s = waited_s + last[-1].first_step_s - started_s
            prefill_s = last[-1].ended_s - last[-1].first_step_s
            num_cached = last[-1].chunk.num_present
            self._count(queue_s, prefill_s, len(claim.token_ids) - 1, num_cached)
            await claim.seal(
                boundary_token_id=claim.token_ids[-1],
                queue_s=queue_s,
                prefill_s=prefill_s,
                num_cached_tokens=num_cached,
            )

    async def _ship(self, claim: PromptClaim, inbox: Inbox) -> list[ChunkComputed]:
        """Send each chunk as it comes, until every token but the boundary token is on its way; returns what came of the
        last tokens."""
        while True:
            events = [await _unless_cancelled(claim, inbox)]
            await self._send(claim, events[-1].chunk)
            while not events[-1].chunk.is_whole:
                events.append(await _unless_cancelled(claim, inbox))
                await self._send(claim, events[-1].chunk)
            self._engine.post(lambda engine: engine.chunk_sent(inbox.request_id))
            if events[-1].chunk.end == len(claim.token_ids) - 1:
                return events

    def _tell(self, grant: Grant, reason: str, error: ShoalError | None = None) -> None:
        """Why it failed, and now and then also where: of a peer that is gone, each prompt says the same."""
        where = error if error is not None and self._told.take() else None
        _log.warning("a hand-off failed", peer=grant.handoff_address, reason=reason, exc_info=where)

    def _count(self, queue_s: float, prefill_s: float, num_tokens: int, num_cached: int) -> None:
        self._metrics.queued(queue_s)
        self._metrics.looked_up(num_tokens, num_cached)
        self._metrics.prefilled(
            self._depth,
            prefill_s,
            num_layers=self._num_kept,
            computed_tokens=num_tokens - num_cached,
            cached_tokens=num_cached,
        )

    async def _send(self, claim: PromptClaim, chunk: PrefillChunk) -> None:
        if chunk.start < chunk.end:
            layers, payload = chunk.layers, chunk.payload
            held = payload if isinstance(payload, KvRows) else _bytes_of(payload)
            await claim.send(chunk.start, chunk.end, layers.start, layers.stop, held, chunk.wire_mode)


async def _unless_cancelled(claim: PromptClaim, inbox: Inbox) -> ChunkComputed:
    """The next chunk; raises Cancelled as soon as decode no longer wants the prompt."""
    chunk = asyncio.ensure_future(inbox.next())
    cancelled = asyncio.ensure_future(claim.cancelled.wait())
    try:
        await asyncio.wait((chunk, cancelled), return_when=asyncio.FIRST_COMPLETED)
        if cancelled.done():
            raise Cancelled("decode no longer wants this prompt")
        event = chunk.result()
    finally:
        cancelled.cancel()
        if not chunk.cancel() and not chunk.cancelled():
            chunk.exception()  # looked at: both may have come at once
    if not isinstance(event, ChunkComputed):
        raise InternalError(f"expected a chunk, the engine sent {type(event).__name__}")
    return event


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous host tensor's bytes, without a copy."""
    flat = tensor.view(torch.uint8).view(-1).numpy()
    return memoryview(flat)  # type: ignore[arg-type]
