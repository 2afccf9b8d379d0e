"""Prefill and decode processes as a test drives them: all that runs is real, and nothing happens by itself.

Frames stay on their way until the test delivers, loses, doubles or spoils them; copies into blocks, reads of staged
payload and steps of prefill wait for it, too. Ray's calls are tasks.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

from fake_clock import FakeClock, settle
from handoff_gates import BLOCK_TOKENS, NUM_BLOCKS, Blocks, Gates, SlowUnloader, Wire
from kv_prompts import PLAN, SHAPE, Prompt
from remote_memory import Remote
from transfer_helpers import send_all

from shoal.engine.blocks import BlockAllocator
from shoal.errors import Cancelled, PeerGone, ShoalError
from shoal.handoff.channels.memory import Rule
from shoal.handoff.decode_session import Attach
from shoal.handoff.decode_side import HandoffDesk
from shoal.handoff.lease import Lease
from shoal.handoff.lease_table import LeaseTimes
from shoal.handoff.offer import Staging
from shoal.handoff.prefill_side import PromptClaim
from shoal.handoff.server import HandoffServer
from shoal.handoff.session import Identity
from shoal.handoff.session_pool import SessionPool
from shoal.wire.handoff_messages import Chunk, RemoteSegment, WireMode

TIMES = LeaseTimes(claim_timeout_s=30.0, ttl_s=5.0)
CREDIT_BYTES, MAX_FRAME_BYTES, NUM_SLOTS = 1024, 512, 3


@dataclass
class Request:
    """What a client asked, and what became of it."""

    lease_id: bytes
    wanted: Prompt
    is_astray: bool = False
    """Nobody tells decode how prefill's work on it ended: Serve brought the call to another replica."""
    lease: Lease | None = None
    task: asyncio.Task[None] = field(init=False)
    may_end: asyncio.Event = field(default_factory=asyncio.Event)
    was_right: bool | None = None
    """Whether the K/V were the prompt's when they were committed, and still at the end. None: not committed."""


class PrefillProcess:
    """One start of a prefill replica."""

    def __init__(self, pools: Pools, incarnation: int) -> None:
        self.incarnation = incarnation
        self.is_gone = False
        self.allocator = BlockAllocator(NUM_BLOCKS)
        self.steps = Gates()
        self.serving: set[asyncio.Task[None]] = set()
        self.unaccepted: list[bytes] = []
        self._pools = pools
        staging = partial(pools.remote.open_loader, MAX_FRAME_BYTES, (1 + NUM_SLOTS) * 4096)
        self.sessions = SessionPool(
            partial(pools.connect, self), Identity(incarnation, (PLAN,), tuple(WireMode), peer="prefill"),
            ttl_s=TIMES.ttl_s, max_frame_bytes=MAX_FRAME_BYTES, clock=pools.clock,
            staging=Staging(remote=staging if pools.is_staged else None),
        )  # fmt: skip

    async def call(self, request: Request) -> None:
        """As Ray does it: who is cut off is neither heard nor reached."""
        work = asyncio.get_running_loop().create_task(self._serve(request))
        self.serving.add(work)
        work.add_done_callback(self._served)
        try:
            await asyncio.wait((work,))
        finally:
            if not self.is_gone and not self._pools.decode_of(request).is_gone:
                work.cancel()
        if self.is_gone:
            await asyncio.Event().wait()
        if work.cancelled():
            raise PeerGone("the replica died")
        await work

    async def _serve(self, request: Request) -> None:
        wanted = request.wanted
        blocks = self.allocator.allocate(-(-len(wanted.token_ids) // BLOCK_TOKENS))
        try:
            session = await self.sessions.get("decode")
            async with session.claim(request.lease_id) as claim:
                self._check(request, claim)
                await self._compute(claim)
                await send_all(claim, wanted)
                await claim.seal(boundary_token_id=claim.token_ids[-1], queue_s=0.0, prefill_s=0.0)
        finally:
            self.allocator.release(blocks)

    async def _compute(self, claim: PromptClaim) -> None:
        """Takes as long as the test wants, or until decode wants it no more."""
        ways = [asyncio.ensure_future(self.steps()), asyncio.ensure_future(claim.cancelled.wait())]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
        if claim.cancelled.is_set():
            raise Cancelled("decode no longer wants this prompt")

    def _check(self, request: Request, claim: PromptClaim) -> None:
        owner = None if request.lease is None else request.lease.owner
        if owner is None or owner.incarnation != self.incarnation or claim.token_ids != request.wanted.token_ids:
            self.unaccepted.append(request.lease_id)

    def _served(self, work: asyncio.Task[None]) -> None:
        self.serving.discard(work)
        if not work.cancelled():
            work.exception()


class DecodeProcess:
    """One start of a decode replica."""

    def __init__(self, pools: Pools, incarnation: int) -> None:
        self.incarnation = incarnation
        self.is_gone = False
        self.allocator = BlockAllocator(NUM_BLOCKS)
        self.blocks = Blocks()
        self.reads = Gates()
        self.requests: list[Request] = []
        self.serving: set[asyncio.Task[None]] = set()
        self.unloaders: list[SlowUnloader] = []
        self._pools = pools
        self.desk = HandoffDesk(self.blocks, SHAPE, times=TIMES, credit_bytes=CREDIT_BYTES, clock=pools.clock)
        attach = Attach(remote=self._attach if pools.is_staged else None)
        mode = WireMode.HIDDEN if pools.is_hidden else WireMode.KV
        self.server = HandoffServer(self.desk, Identity(incarnation, (PLAN,), (mode,), peer="decode"), attach)

    def ask(self, wanted: Prompt, lease_id: bytes, prefill: PrefillProcess, *, is_astray: bool = False) -> Request:
        """Begin a request. Raises OutOfBlocks, with nothing taken."""
        blocks = self.allocator.allocate(-(-len(wanted.token_ids) // BLOCK_TOKENS))
        request = Request(lease_id, replace(wanted, blocks=tuple(blocks)), is_astray)
        self.blocks.holders |= dict.fromkeys(blocks, lease_id)
        request.task = asyncio.get_running_loop().create_task(self._answer(request, prefill))
        self.requests.append(request)
        return request

    async def serve(self, wire: Wire) -> None:
        with suppress(ShoalError):
            await self.server.serve(wire.decode)

    async def _answer(self, request: Request, prefill: PrefillProcess) -> None:
        wanted = request.wanted
        try:
            async with self.desk.open(
                request.lease_id, wanted.token_ids, wanted.blocks, num_present=wanted.num_present
            ) as held:
                request.lease = held.lease
                call = asyncio.ensure_future(prefill.call(request))
                arrived = asyncio.ensure_future(held.arrived())
                try:
                    await asyncio.wait((call, arrived), return_when=asyncio.FIRST_COMPLETED)
                    if not arrived.done() and not request.is_astray:
                        await call
                    await arrived
                except BaseException:
                    call.cancel()
                    raise
                finally:
                    arrived.cancel()
                    self._pools.watch(call)
            was_right = self.blocks.holds(wanted)
            await request.may_end.wait()
            request.was_right = was_right and self.blocks.holds(wanted)
        finally:
            for block in wanted.blocks:
                del self.blocks.holders[block]
            self.allocator.release(wanted.blocks)

    async def _attach(self, segment: RemoteSegment, failed: object) -> SlowUnloader | None:
        loader = self._pools.remote.loaders.get(segment.nonce)
        if loader is None or loader.is_closed:
            return None
        self.unloaders.append(SlowUnloader(loader, self.reads, self._wants))
        return self.unloaders[-1]

    def _wants(self, chunk: Chunk) -> bool:
        held = self.desk._open.get(chunk.lease_id)
        return held is not None and self.desk.table.receiving(chunk.lease_id, held.lease.owner) is not None  # type: ignore[arg-type]


class Pools:
    """Two prefill replicas and a decode replica, and all that was said between them."""

    def __init__(self, *, is_staged: bool, is_hidden: bool) -> None:
        self.is_staged, self.is_hidden = is_staged, is_hidden
        self.clock = FakeClock()
        self.remote = Remote()
        self.wires: list[Wire] = []
        self.rules: list[Rule] = []
        self.dead: list[PrefillProcess | DecodeProcess] = []
        self._num_starts = 0
        self._calls: set[asyncio.Future[None]] = set()
        self.all_prefills: list[PrefillProcess] = []
        self.all_decodes: list[DecodeProcess] = []
        self.prefills = [self._start_prefill() for _ in range(2)]
        self.decode = self._start_decode()

    def _start_prefill(self) -> PrefillProcess:
        self._num_starts += 1
        self.all_prefills.append(PrefillProcess(self, self._num_starts))
        return self.all_prefills[-1]

    def _start_decode(self) -> DecodeProcess:
        self._num_starts += 1
        self.all_decodes.append(DecodeProcess(self, self._num_starts))
        return self.all_decodes[-1]

    async def connect(self, owner: PrefillProcess, address: str) -> object:
        if owner.is_gone:
            raise PeerGone("nobody is reached from here")
        wire = Wire(owner, self.decode, self.rules)
        self.wires.append(wire)
        task = asyncio.ensure_future(self.decode.serve(wire))
        self.decode.serving.add(task)
        task.add_done_callback(self.decode.serving.discard)
        return wire.prefill

    def decode_of(self, request: Request) -> DecodeProcess:
        return next(decode for decode in self.all_decodes if request in decode.requests)

    def watch(self, call: asyncio.Future[None]) -> None:
        self._calls.add(call)
        call.add_done_callback(lambda call: call.cancelled() or call.exception())
        call.add_done_callback(self._calls.discard)

    @property
    def living(self) -> list[PrefillProcess | DecodeProcess]:
        return [*self.prefills, self.decode]

    # --- death and rebirth ------------------------------------------------------------------------------

    async def cut_off(self, process: PrefillProcess | DecodeProcess) -> None:
        """It goes on, reaches nobody, and nobody is told; another one takes its place."""
        process.is_gone = True
        for wire in self.wires:
            if process in (wire.owner, wire.peer):
                wire.cut(0, 1)
        self._replace(process)
        await settle()

    async def kill(self, process: PrefillProcess | DecodeProcess) -> None:
        """It's dead: its connections break, and another one takes its place."""
        await self.cut_off(process)
        self.dead.append(process)
        if isinstance(process, PrefillProcess):
            for work in tuple(process.serving):
                work.cancel()
            process.is_gone = False  # Ray tells who called it
            await process.sessions.close()
            await settle()
            process.is_gone = True
        else:
            for request in process.requests:
                request.task.cancel()
            await self._let_go(process)
            await process.server.close()
        await settle()

    def _replace(self, process: PrefillProcess | DecodeProcess) -> None:
        if isinstance(process, PrefillProcess):
            self.prefills[self.prefills.index(process)] = self._start_prefill()
        else:
            self.decode = self._start_decode()

    async def _let_go(self, process: DecodeProcess) -> None:
        await settle()
        while process.blocks.copies.waiting or process.reads.waiting:
            for gates in (process.blocks.copies, process.reads):
                if gates.waiting:
                    gates.open()
            await settle()

    # --- the end ----------------------------------------------------------------------------------------

    async def flow(self) -> None:
        """All frames in order, all copies, reads and steps, until nothing is left to do at this time."""
        while True:
            await settle()
            waiting = [*(wire for wire in self.wires if any(wire.under_way))]
            gates = [process.steps for process in self.all_prefills]
            gates += [gate for decode in self.all_decodes for gate in (decode.blocks.copies, decode.reads)]
            gates = [gate for gate in gates if gate.waiting]
            if not waiting and not gates:
                return
            for gate in gates:
                gate.open()
            for wire in waiting:
                for way in (0, 1):
                    if wire.under_way[way]:
                        await wire.deliver(way, wire.under_way[way].pop(0))

    async def wait(self, seconds: float) -> None:
        """Time in which everything flows."""
        for _ in range(int(seconds / 0.5)):
            await self.flow()
            await self.clock.advance(0.5)
        await self.flow()

    async def close(self) -> None:
        for prefill in self.all_prefills:
            await prefill.sessions.close()
        for decode in self.all_decodes:
            await self._let_go(decode)
            await decode.server.close()
            for unloader in decode.unloaders:
                for task in tuple(unloader.tasks):
                    task.cancel()
        for call in tuple(self._calls):  # to whom was cut off after decode had committed
            call.cancel()
        await settle()
