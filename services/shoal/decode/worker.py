"""One decode replica without Ray: it orchestrates a request from its reservation to its last token.

::

    submit (hold) ─> blocks reserved ─> grant a lease, ask prefill ─> K/V verified and committed ─> boundary step ─> …
                                              │
                                              └─ any failure: the lease ends, and the ladder says who fills the same
                                                 blocks instead (ladder.py). A fault never changes depth.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import structlog

from shoal.config import HandoffConfig
from shoal.config.rate import TOLD, RateLimit
from shoal.decode.admission import Admission, Admitted
from shoal.decode.affinity import prefix_keys
from shoal.decode.ladder import Ladder
from shoal.decode.prefill_pool import PrefillPool
from shoal.decode.stream import ChoiceStreams, joined
from shoal.decode.ways import Ways, Work
from shoal.engine.client import EngineClient, Inbox, Progress
from shoal.engine.events import Reservation
from shoal.errors import (
    Cancelled,
    DeadlineExceeded,
    HandoffError,
    InternalError,
    OutOfBlocks,
    Overloaded,
    PeerGone,
    PlanMismatch,
    ShoalError,
    Unavailable,
)  # fmt: skip
from shoal.handoff.decode_side import Arrived, CopyFailed, HandoffDesk, OpenLease
from shoal.handoff.lease import Lease
from shoal.model.plan import LayerPlan
from shoal.telemetry import DecodeMetrics
from shoal.telemetry.labels import FallbackRung, PromptWay
from shoal.wire.handoff_messages import Grant, HandoffOutcome
from shoal.wire.messages import Depth, GenerateRequest, HandoffReport, TokenOutput, TtftStages

BOUNDARY_TOKEN_BYTES = 4
LOOK_S = 2.0
"""How often who waits for a prompt to be claimed looks whether anybody is there to."""
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Begun:
    """How a request got to the point where its next step may sample. Times are monotonic seconds; where prefill
    wasn't asked all three are one."""

    way: PromptWay
    report: HandoffReport
    submitted_s: float
    reserved_s: float
    ready_s: float
    arrived: Arrived | None = None


@dataclass(frozen=True, slots=True)
class _Local:
    """Decode is to compute the prompt itself; first of all, or, if it ``stands_back``, when there is room again."""

    way: PromptWay
    reason: str | None = None
    stands_back: bool = False


class DecodeWorker:
    """``prefill`` is the pool that prompts are handed to, if there is one; ``prefill_remembers`` what it computed. Of
    a choice, up to ``stream_interval`` tokens leave together, as the engine tells them."""

    def __init__(
        self,
        engine: EngineClient,
        desk: HandoffDesk,
        *,
        plan: LayerPlan,
        plan_hash: str,
        config: HandoffConfig,
        decode_text: Callable[[Sequence[int]], str],
        prefill: PrefillPool | None,
        metrics: DecodeMetrics,
        prefill_remembers: bool = False,
        stream_interval: int = 1,
    ) -> None:
        self._engine = engine
        self._desk = desk
        self._plan = plan
        self._ways = Ways(plan, config)
        self._plan_hash = plan_hash
        self._resume_digest = plan.resume_digest(plan_hash)
        self._config = config
        self._decode_text = decode_text
        self.prefill = prefill
        self._metrics = metrics
        self._prefill_remembers = prefill_remembers
        self._stream_interval = stream_interval
        self.admission = Admission()
        self._ladder = Ladder(config)
        self._told = RateLimit(TOLD)
        self._given_up: Lease | None = None
        self._wants_blocks = False
        self._calls: set[asyncio.Future[HandoffOutcome]] = set()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        """What one or more steps brought a choice is one output. Closing the iterator, or cancelling it, frees all.

        Raises PlanMismatch for an answer that a replica of another plan has begun, and Overloaded for one that would be
        too late.
        """
        resumption = request.resumption
        if resumption is not None and resumption.plan_hash != self._plan_of(request):
            raise PlanMismatch("the answer was begun by a replica of another plan, and can't go on here: ask again")
        # Not the client's id: a retry of the same request must not meet its predecessor.
        key = f"{request.context.request_id}-{secrets.token_hex(4)}"
        deadline_s = time.monotonic() + request.context.timeout_s
        with self.admission.admitted(request) as admitted, self._engine.open(key) as inbox, self._ways.work() as work:
            async with _until(deadline_s):
                begun = await self._begin(key, request, inbox, work, deadline_s)
            streams = ChoiceStreams(request, self._decode_text)
            has_begun = False
            with _due(inbox, deadline_s):
                while streams.num_open:
                    is_alone = self._stream_interval == 1 or not has_begun
                    outputs: list[TokenOutput] = []
                    for event in await inbox.next_some(1 if is_alone else self._stream_interval * streams.num_open):
                        if not isinstance(event, Progress):
                            raise InternalError(f"expected a token, the engine sent {type(event).__name__}")
                        came = streams.accept(event.event)
                        if came and not has_begun:
                            has_begun = True
                            came[0] = self._first(request, begun, event, came[0], admitted)
                        outputs += came
                    for output in joined(outputs):
                        if isinstance(output.stop_reason, str):
                            choice = output.choice
                            self._engine.post(lambda engine, choice=choice: engine.finish(key, choice))  # type: ignore[misc]
                        self._metrics.decoded(len(output.token_ids))
                        admitted.sent(len(output.token_ids))
                        yield output

    def _first(
        self, request: GenerateRequest, begun: _Begun, event: Progress, output: TokenOutput, admitted: Admitted
    ) -> TokenOutput:
        """``output``, which ``event`` brought, with what the first one tells of the prompt."""
        stages = _stages(begun, event)
        num_cached = min(event.event.num_present, len(request.prompt_token_ids))
        self._count_prompt(request, begun, stages, num_cached)
        if begun.arrived is not None:
            num_cached = max(num_cached, begun.arrived.num_cached_tokens)
        admitted.found(num_cached)
        if request.resumption is not None:  # the replica before has told how its first token came
            return output
        self._metrics.went(begun.way)
        report = replace(begun.report, num_cached_tokens=num_cached, plan_hash=self._plan_of(request))
        return replace(output, stages=stages, handoff=report)

    def _plan_of(self, request: GenerateRequest) -> str:
        """Of whoever may go on with its answer. At full depth no token is computed otherwise than another."""
        return self._resume_digest if request.depth is Depth.SHALLOW else self._plan_hash

    def _count_prompt(self, request: GenerateRequest, begun: _Begun, stages: TtftStages, num_cached: int) -> None:
        self._metrics.looked_up(len(request.prompt_token_ids), num_cached)
        if begun.arrived is not None:
            self._metrics.queued(stages.reserve_s)
            return
        # But for what prefill was waited for in vain: the request had its place meanwhile.
        self._metrics.queued(stages.reserve_s + stages.queue_s - (begun.ready_s - begun.reserved_s))
        depth = begun.report.depth
        self._metrics.prefilled(
            depth,
            stages.prefill_s,
            num_layers=len(self._plan.layers_run(depth)),
            computed_tokens=len(request.prompt_token_ids) - num_cached,
            cached_tokens=num_cached,
        )

    # --- until the first step -------------------------------------------------------------------------

    async def _begin(self, key: str, request: GenerateRequest, inbox: Inbox, work: Work, deadline_s: float) -> _Begun:
        submitted_s = time.monotonic()
        way = PromptWay.NO_POOL if self.prefill is None else self._ways.of(request)
        pool = self.prefill if way is PromptWay.HANDED_OFF else None
        fallback = None
        if pool is not None and not await pool.living():
            # A call to nobody would just wait.
            pool, fallback = None, self._count_fallback(FallbackRung.LOCAL, "no_prefill")
        elif pool is not None and self._ladder.is_at_its_end(request.context.attempt):
            # Other decode replicas have died under it: there would be nothing below a hand-off that fails.
            pool, fallback = None, self._count_fallback(FallbackRung.LOCAL, "last_attempt")
        if pool is None:
            work.begin()
        await self._submit(key, request, deadline_s - submitted_s, hold=pool is not None)
        if pool is None:
            report = HandoffReport(self._ways.depth_run(request), transferred=False, fallback=fallback)
            way = way if fallback is None else PromptWay.FALLBACK
            return _Begun(way, report, submitted_s, submitted_s, submitted_s)
        reservation = await inbox.reserved()
        reserved_s = time.monotonic()
        if self._ways.is_soon_done(request, reservation.num_present):
            arrived: Arrived | _Local = _Local(PromptWay.CACHED)
        else:
            arrived = await self._descend(pool, request, reservation, work, deadline_s)
        work.begin()
        if isinstance(arrived, _Local):
            return await self._prefill_locally(key, request, arrived, submitted_s, reserved_s)
        ready_s = time.monotonic()  # before the engine is told: it may be done with the step before we hear of it
        num_arrived = len(request.prompt_token_ids) - 1
        await self._engine.call(lambda engine: engine.start(key, num_arrived=num_arrived))
        report = HandoffReport(
            self._ways.depth_run(request),
            transferred=True,
            num_prefill_layers=self._plan.num_kept,
            shallow_bytes=arrived.num_bytes.shallow,
            deep_bytes=arrived.num_bytes.deep,
            hidden_bytes=arrived.num_bytes.hidden,
            boundary_bytes=BOUNDARY_TOKEN_BYTES,
        )
        return _Begun(way, report, submitted_s, reserved_s, ready_s, arrived)

    async def _submit(self, key: str, request: GenerateRequest, timeout_s: float, *, hold: bool) -> None:
        """Raises Overloaded if the queue is full, InvalidRequest if it could never fit."""
        try:
            await self._engine.call(
                lambda engine: engine.submit_generate(
                    key,
                    request.prompt_token_ids,
                    request.depth,
                    request.sampling,
                    hold=hold,
                    outline=request.outline,
                    tenant=request.context.tenant,
                    timeout_s=timeout_s,
                    sent=() if request.resumption is None else request.resumption.choices,
                )
            )
        except Overloaded as error:
            raise Overloaded(error.message, retry_after_s=self.admission.drain_s) from error

    async def _descend(
        self, pool: PrefillPool, request: GenerateRequest, reservation: Reservation, work: Work, deadline_s: float
    ) -> Arrived | _Local:
        """Hand the prompt off, down the ladder as far as it takes. Raises Unavailable below the last rung, PeerGone if
        this replica is shutting down."""
        excluded: frozenset[str] = frozenset()
        attempt = request.context.attempt
        while True:
            grant = self._grant(request, reservation.num_present, deadline_s, attempt, excluded | pool.unfit)
            try:
                with self._standing_back(grant.lease_id):
                    return await self._hand_off(pool, grant, request.prompt_token_ids, reservation.blocks, work)
            except (Cancelled, DeadlineExceeded):
                raise
            except _TooBusy:
                _log.info("prefill is busy: computed here", replica_id=pool.asked(grant))
                return _Local(PromptWay.BUSY)
            except OutOfBlocks as error:  # nobody failed: an older sequence wants the blocks, so it stands back
                reason = self._count_fallback(FallbackRung.LOCAL, error.code)
                return _Local(PromptWay.FALLBACK, reason, stands_back=True)
            except ShoalError as error:
                if self._desk.is_closed:  # every rung would end with this process: another one goes on
                    raise PeerGone("this decode replica is shutting down", retry_after_s=1.0) from error
                is_ours = isinstance(error, CopyFailed)
                failed = None if is_ours else pool.asked(grant)
                excluded |= frozenset(() if failed is None else (failed,))
                has_other = not is_ours and bool(await pool.living(now=True) - excluded)
                rung = self._ladder.after(attempt, has_other_replica=has_other)
                # Of what prefill gave up, its own log says where; of a replica that is gone, each prompt says the same.
                is_told = not isinstance(error, _GivenUp) and self._told.take()
                reason = error.reason if isinstance(error, _GivenUp) else error.code
                self._count_fallback(rung, reason, replica_id=failed, exc_info=error if is_told else None)
                if rung is FallbackRung.LOCAL:
                    return _Local(PromptWay.FALLBACK, reason)
                if rung is FallbackRung.UNAVAILABLE:
                    raise Unavailable(
                        "the prompt could not be handed from prefill to decode: try again in a moment",
                        retry_after_s=self._ladder.retry_after_s,
                    ) from error
                attempt += 1

    def _grant(
        self, request: GenerateRequest, num_present: int, deadline_s: float, attempt: int, excluded: frozenset[str]
    ) -> Grant:
        timeout_s = max(0.0, deadline_s - time.monotonic())
        tenant, token_ids = request.context.tenant, request.prompt_token_ids
        return Grant(
            lease_id=secrets.token_bytes(16),
            handoff_address=self._desk.address,
            plan_hash=self._plan_hash,
            num_prompt_tokens=len(token_ids),
            num_present=num_present,
            ttl_s=self._config.ttl_s,
            claim_timeout_s=self._config.claim_timeout_s,
            context=replace(request.context, timeout_s=timeout_s, attempt=attempt),
            excluded=excluded,
            prefix_keys=prefix_keys(tenant, token_ids) if self._prefill_remembers else (),
        )

    async def _hand_off(
        self, pool: PrefillPool, grant: Grant, token_ids: tuple[int, ...], blocks: tuple[int, ...], work: Work
    ) -> Arrived:
        """Open the lease, ask prefill, and wait until the K/V are verified. On return or error the lease is over and
        nobody writes into ``blocks`` any more. Raises _TooBusy, with ``work`` begun, where it's sooner done here."""
        async with self._desk.open(grant.lease_id, token_ids, blocks, num_present=grant.num_present) as lease:
            self.told_of_blocks(wanted=self._wants_blocks)  # maybe said before there was a lease to give up
            call = asyncio.ensure_future(pool.ask(grant))
            arrived = asyncio.ensure_future(lease.arrived())
            try:
                while not await _ends((call, arrived), min(LOOK_S, self._ways.look_s(lease.waited_s))):
                    if lease.lease.is_unclaimed and not await pool.living() and lease.lease.is_unclaimed:
                        raise _GivenUp("no_prefill")  # Serve would hold the call until there is one
                    if not lease.lease.has_begun and self._ways.is_better_here(lease.waited_s):
                        work.begin()  # at once: the others that wait are to see it
                        raise _TooBusy
                if not arrived.done():
                    await self._outlive(call, arrived, lease)
                return await arrived
            except BaseException:  # also a cancellation: prefill must not work on for nobody
                call.cancel()
                raise
            finally:
                arrived.cancel()
                # On success prefill's call ends a moment later, when it hears that its K/V are committed; one that
                # another replica holds, which waits for room, doesn't.
                self._calls.add(call)
                call.add_done_callback(self._call_ended)
                if not call.done():
                    asyncio.get_running_loop().call_later(self._config.ttl_s, call.cancel)

    async def _outlive(
        self, call: asyncio.Future[HandoffOutcome], arrived: asyncio.Future[Arrived], held: OpenLease
    ) -> None:
        """The call has ended, and nothing has arrived. Raises why, if nothing will.

        The replica that was called ends its call after its lease, so either that is committed or it never will be. But
        Serve may have called another one than the one that was granted the prompt by its session, and has claimed it;
        or have none to call. Then the lease says what becomes of the prompt; where a replica has gone, which may be the
        one that claimed it, for no longer than the lease would live in silence.
        """
        is_claimed = not held.lease.is_unclaimed
        try:
            outcome = await call
        except PeerGone:
            if not is_claimed:
                raise
            await asyncio.wait([arrived], timeout=self._config.ttl_s)
            if not arrived.done():
                raise
        except ShoalError:
            if not is_claimed:
                raise
        else:
            if not is_claimed or outcome.had_claim:
                _raise_if_given_up(outcome)

    def told_of_blocks(self, *, wanted: bool) -> None:
        """If a running sequence wants blocks, the youngest lease that no prefill works on yet gives up its own: one at
        a time, since steps that were planned before they came back want them still. (Where a request ends instead of
        standing back, its blocks come a moment later than the next may give up.)"""
        self._wants_blocks = wanted
        if not wanted or self._given_up is not None:
            return
        self._given_up = self._desk.table.youngest_unclaimed
        if self._given_up is not None:
            self._given_up.cancel(OutOfBlocks("an older sequence needs the blocks"))

    @contextmanager
    def _standing_back(self, lease_id: bytes) -> Iterator[None]:
        """Within the block, the lease may be the one that gives up its blocks; unless it ends by that, the next may."""
        stands_back = False
        try:
            yield
        except OutOfBlocks:
            stands_back = True  # _prefill_locally sees its blocks back
            raise
        finally:
            if not stands_back and self._given_up is not None and self._given_up.lease_id == lease_id:
                self._given_up = None

    def _count_fallback(self, rung: FallbackRung, reason: str, **about: object) -> str:
        self._metrics.fell_back(rung, reason)
        _log.warning("the hand-off takes another way", rung=str(rung), reason=reason, **about)
        return reason

    def _call_ended(self, call: asyncio.Future[HandoffOutcome]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            call.exception()  # looked at, so that asyncio doesn't report it: the lease has told us already

    async def _prefill_locally(
        self, key: str, request: GenerateRequest, local: _Local, submitted_s: float, reserved_s: float
    ) -> _Begun:
        ready_s = time.monotonic()  # here, too, before the engine is told
        if local.stands_back:
            try:
                await self._engine.call(lambda engine: engine.requeue(key))
            finally:  # its blocks are back, or soon will be: nothing else becomes of a request that ends here
                self._given_up = None
        else:
            await self._engine.call(lambda engine: engine.start(key))
        report = HandoffReport(self._ways.depth_run(request), transferred=False, fallback=local.reason)
        return _Begun(local.way, report, submitted_s, reserved_s, ready_s)


class _TooBusy(Exception):
    """Nothing of the prompt has come for some time, and here nothing else is to do."""


class _GivenUp(HandoffError):
    """Why prefill gave a lease up, in its own word, or that nobody is there, is ``reason``."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the pool doesn't prefill the prompt: {reason}")
        self.reason = reason


async def _ends(either: Sequence[asyncio.Future[Any]], within_s: float) -> bool:
    """Wait until one of them has ended, no longer than ``within_s``; whether one has."""
    ended, _ = await asyncio.wait(either, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
    return bool(ended)


def _raise_if_given_up(outcome: HandoffOutcome) -> None:
    if not outcome.committed:
        raise _GivenUp(outcome.reason or HandoffError.code)


@asynccontextmanager
async def _until(deadline_s: float) -> AsyncIterator[None]:
    """DeadlineExceeded if the block outlasts ``deadline_s`` (monotonic seconds)."""
    try:
        async with asyncio.timeout(deadline_s - time.monotonic()):
            yield
    except TimeoutError as error:
        raise _too_late() from error


@contextmanager
def _due(inbox: Inbox, deadline_s: float) -> Iterator[None]:
    """After ``deadline_s``, DeadlineExceeded is what comes: one timer for a request, where a block around each of its
    tokens would be one each."""
    timer = asyncio.get_running_loop().call_later(deadline_s - time.monotonic(), inbox.put, _too_late())
    try:
        yield
    finally:
        timer.cancel()


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the request's deadline has passed")


def _stages(begun: _Begun, first: Progress) -> TtftStages:
    """The waterfall of the first token; the parts add up to submission -> end of the first sampling step."""
    reserve_s = begun.reserved_s - begun.submitted_s
    if begun.arrived is None:  # decode prefilled the prompt itself, its boundary step included
        first_step_s = first.event.first_step_s
        return TtftStages(reserve_s, first_step_s - begun.reserved_s, first.ended_s - first_step_s, 0.0, 0.0)
    waited_s = begun.ready_s - begun.reserved_s
    return TtftStages(
        reserve_s=reserve_s,
        queue_s=begun.arrived.queue_s,
        prefill_s=begun.arrived.prefill_s,
        transfer_exposed_s=waited_s - begun.arrived.queue_s - begun.arrived.prefill_s,
        boundary_step_s=first.ended_s - begun.ready_s,
    )
