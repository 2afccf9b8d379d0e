"""A prefill and a decode side in one process, joined by memory or by gRPC on loopback, with a real sink of arrays."""

from __future__ import annotations

import asyncio
import mmap
import os
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from kv_prompts import NUM_LAYERS, NUM_SHALLOW, PLAN, SHAPE, ArraySink, Prompt, lease_id, prompt
from remote_memory import Remote
from role_certificates import Roles

from shoal.errors import ShoalError
from shoal.handoff.base import Channel, Clock, new_incarnation
from shoal.handoff.carriers.nixl.loader import NixlLoader
from shoal.handoff.carriers.nixl.process import Nixl
from shoal.handoff.carriers.shm import FOLDER, ShmLoader, ShmUnloader
from shoal.handoff.channels.grpc import dial
from shoal.handoff.channels.memory import Rule, deliver, memory_pair
from shoal.handoff.decode_session import Attach
from shoal.handoff.decode_side import Arrived, HandoffDesk, OpenLease
from shoal.handoff.lease_table import LeaseTimes
from shoal.handoff.offer import Staging
from shoal.handoff.prefill_side import PromptClaim
from shoal.handoff.server import HandoffServer
from shoal.handoff.session import Identity
from shoal.handoff.session_pool import SessionPool
from shoal.model.kv_rows import KvRows
from shoal.wire.handoff_messages import Carrier, WireMode
from shoal.wire.peers import PeerTls

# Read by UCX, from the environment alone, when an agent is made: tests stay on loopback.
os.environ.setdefault("UCX_NET_DEVICES", "lo")


def _has_nixl() -> bool:
    try:
        import nixl._api  # noqa: F401 - of two packages that it needs, the second may be missing
    except ImportError:
        return False
    return True


needs_nixl = pytest.mark.skipif(not _has_nixl(), reason="NIXL isn't installed: pip install --no-deps nixl nixl-cu13")

TIMES = LeaseTimes(claim_timeout_s=30.0, ttl_s=5.0)
CREDIT_BYTES = 4096
MAX_FRAME_BYTES = 1024
CHUNK_TOKENS = 10
PORTS = (23100, 23999)


class Counts:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.bytes_by_carrier: Counter[str] = Counter()
        self.num_by_state: Mapping[str, int] = {}
        self.seconds: list[float] = []
        self._changed = asyncio.Event()

    async def reached(self, state: str) -> None:
        """Wait until a lease is in ``state``."""
        while not self.num_by_state.get(state):
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), 10)

    def transfer_started(self) -> None:
        self.events["started"] += 1

    def transfer_committed(self, seconds: float) -> None:
        self.events["committed"] += 1
        self.seconds.append(seconds)

    def transfer_failed(self, reason: str) -> None:
        self.events[f"failed:{reason}"] += 1

    def shipped(self, part: str, num_bytes: int, carrier: Carrier) -> None:
        self.bytes[part] += num_bytes
        self.bytes_by_carrier[carrier] += num_bytes

    def verify_failed(self, check: str) -> None:
        self.events[f"verify:{check}"] += 1

    def leases(self, num_by_state: Mapping[str, int]) -> None:
        self.num_by_state = num_by_state
        self._changed.set()

    def lease_ended(self, age_s: float) -> None:
        self.events["ended"] += 1

    def lease_expired(self) -> None:
        self.events["expired"] += 1


@dataclass
class Rig:
    """Both sides. ``channels`` are prefill's ends of the channels that were opened, in order."""

    desk: HandoffDesk
    server: HandoffServer
    sink: ArraySink
    pool: SessionPool
    counts: Counts
    address: str
    connect: Callable[[str], asyncio.Future[Channel]]
    channels: list[Channel] = field(default_factory=list)
    loaders: list[ShmLoader] = field(default_factory=list)
    folder: Path = FOLDER
    nixl: list[Nixl] = field(default_factory=list)
    nixl_loaders: list[NixlLoader] = field(default_factory=list)

    async def hand_off(self, wanted: Prompt, **ways: object) -> Arrived:
        """One prompt, as a decode replica does it: open a lease, call prefill, wait for whichever ends first."""
        new_id = lease_id()
        async with self.open(new_id, wanted) as lease:
            call = asyncio.ensure_future(self.prefill(new_id, wanted, **ways))  # type: ignore[arg-type]
            arrived = asyncio.ensure_future(lease.arrived())
            try:
                await asyncio.wait((call, arrived), return_when=asyncio.FIRST_COMPLETED)
                if not arrived.done():
                    await call
                return await arrived
            finally:
                arrived.cancel()
                await asyncio.wait((call, arrived))
                if not call.cancelled():
                    call.exception()

    def open(self, new_id: bytes, wanted: Prompt) -> AbstractAsyncContextManager[OpenLease]:
        return self.desk.open(new_id, wanted.token_ids, wanted.blocks, num_present=wanted.num_present)

    async def prefill(
        self, new_id: bytes, wanted: Prompt, *, before_seal: Callable[[PromptClaim], object] | None = None
    ) -> None:
        """One prompt, as a prefill replica does it. Returns once it's committed, or raises."""
        session = await self.pool.get(self.address)
        async with session.claim(new_id) as claim:
            await send_all(claim, wanted)
            if before_seal is not None:
                before_seal(claim)
            await claim.seal(boundary_token_id=claim.token_ids[-1], queue_s=0.25, prefill_s=0.5)

    def assert_arrived(self, wanted: Prompt) -> None:
        """The blocks hold exactly what prefill computed, in the range that was to be shipped."""
        array = self.sink.arrays[wanted.blocks]
        shipped = slice(wanted.num_present, len(wanted.token_ids) - 1)
        np.testing.assert_array_equal(array[:, shipped], wanted.kv[:, shipped])
        assert not array[:, : shipped.start].any()
        assert not array[:, shipped.stop :].any()

    def assert_nothing_held(self) -> None:
        """No lease, no claim, no copy: everybody has given back what they took."""
        assert self.desk.table.num_open == 0, self.desk.table.counts
        assert self.desk.idle.is_set()
        assert not self.desk._open
        assert not self.desk._copies
        assert not +self.sink.writing
        assert not self.counts.num_by_state
        started, committed = self.counts.events["started"], self.counts.events["committed"]
        failed = sum(number for event, number in self.counts.events.items() if event.startswith("failed:"))
        assert started == committed + failed
        for task in self.pool._opened.values():
            if task.done() and not task.cancelled() and task.exception() is None:
                assert task.result().num_claims == 0


async def send_all(claim: PromptClaim, wanted: Prompt, *, until: int | None = None) -> None:
    """Each chunk of tokens in two pieces, kept layers from a pool and projected ones or their states as they are made,
    as prefill computes them."""
    num_tokens = wanted.kv.shape[1]
    pool = tuple(np.ascontiguousarray(wanted.kv[:NUM_SHALLOW, ::-1]))  # it has them in another order
    end = len(claim.token_ids) - 1 if until is None else until
    for start in range(claim.num_present, end, CHUNK_TOKENS):
        stop = min(start + CHUNK_TOKENS, end)
        shallow = KvRows(pool, num_tokens - 1 - np.arange(start, stop))
        deep = wanted.states[start:stop] if claim.wire_mode is WireMode.HIDDEN else wanted.kv[NUM_SHALLOW:, start:stop]
        await claim.send(start, stop, 0, NUM_SHALLOW, shallow)
        await claim.send(start, stop, NUM_SHALLOW, NUM_LAYERS, _bytes_of(deep), claim.wire_mode)


def _bytes_of(array: npt.NDArray[np.uint8]) -> memoryview:
    return memoryview(np.ascontiguousarray(array)).cast("B")


@asynccontextmanager
async def rig(
    kind: str = "memory",
    *,
    num_slots: int = 64,
    prefill_sends: Rule = deliver,
    decode_sends: Rule = deliver,
    clock: Clock | None = None,
    times: LeaseTimes = TIMES,
    credit_bytes: int = CREDIT_BYTES,
    prefill_plans: tuple[str, ...] = (PLAN,),
) -> AsyncIterator[Rig]:
    """Both sides, closed afterwards; fails if anything is held then.

    ``kind`` is the channel (memory, grpc, tls), the carriers beside inline (memory+shm, grpc+nixl, grpc+shm+nixl), and
    the wire mode if it isn't kv (memory+hidden). ``far`` is a fake of nixl between two hosts: both greet twice, since
    decode doesn't find what is in shared memory.
    """
    channel_kind, *ways_of = kind.split("+")
    carriers = [way for way in ways_of if way != "hidden"]
    wanted = WireMode.HIDDEN if "hidden" in ways_of else WireMode.KV
    counts, sink = Counts(), ArraySink()
    desk = HandoffDesk(sink, SHAPE, times=times, credit_bytes=credit_bytes, clock=clock, observer=counts)
    with tempfile.TemporaryDirectory(prefix="shoal-test-", dir=FOLDER) as name:
        folder = Path(name)
        nixl = [Nixl(1 << 20), Nixl(1 << 20)] if "nixl" in carriers else []
        remote = Remote()
        attach = Attach(
            partial(ShmUnloader.attach, folder=folder) if "shm" in carriers else None,
            partial(nixl[1].attach, deadline_s=times.ttl_s) if nixl else None,
        )
        if "far" in carriers:
            attach = Attach(lambda segment: None, remote.attach)
        server = HandoffServer(desk, Identity(new_incarnation(), (PLAN,), (wanted,), peer="decode"), attach)
        channels: list[Channel] = []
        loaders: list[ShmLoader] = []
        nixl_loaders: list[NixlLoader] = []
        serving: set[asyncio.Task[None]] = set()
        certificates = Roles(folder / "certs").folder if channel_kind == "tls" else None
        tls = None if certificates is None else PeerTls(certificates, "decode")
        address = "memory" if channel_kind == "memory" else await server.listen("127.0.0.1", *PORTS, tls=tls)

        async def connect(address: str) -> Channel:
            if channel_kind == "memory":
                channel, other = memory_pair(prefill_sends=prefill_sends, decode_sends=decode_sends)
                serving.add(asyncio.ensure_future(_serve(server, other)))
            else:
                channel = await dial(address, None if certificates is None else PeerTls(certificates, "prefill"))
            channels.append(channel)
            return channel

        def stage() -> ShmLoader:
            # A page for the head, and a slot of MAX_FRAME_BYTES takes one, too.
            loaders.append(ShmLoader.create(MAX_FRAME_BYTES, (1 + num_slots) * mmap.PAGESIZE, folder))
            return loaders[-1]

        async def stage_remote() -> NixlLoader:
            nixl_loaders.append(await nixl[0].open_loader(MAX_FRAME_BYTES, (1 + num_slots) * mmap.PAGESIZE))
            return nixl_loaders[-1]

        ways = Staging(stage if "shm" in carriers else None, stage_remote if nixl else None)
        if "far" in carriers:
            ways = Staging(stage, partial(remote.open_loader, MAX_FRAME_BYTES, (1 + num_slots) * 4096))
        identity = Identity(new_incarnation(), prefill_plans, tuple(WireMode), peer="prefill")
        pool = SessionPool(
            connect,
            identity,
            ttl_s=times.ttl_s,
            max_frame_bytes=MAX_FRAME_BYTES,
            clock=clock,
            staging=ways,
        )
        both = Rig(desk, server, sink, pool, counts, address, connect, channels, loaders, folder, nixl, nixl_loaders)
        try:
            yield both
        finally:
            await pool.close()
            await server.close()
            if serving:
                await asyncio.wait(serving)
            for each in nixl:
                await _readers_gone(each)
                await each.close()
            left = set(os.listdir(folder)) - {"certs"}  # noqa: PTH208 - names say it all
    both.assert_nothing_held()
    assert not left
    assert all(loader._memory.closed for loader in (*loaders, *nixl_loaders, *remote.loaders.values()))
    assert all(each.num_readers == 0 for each in nixl)


async def _readers_gone(nixl: Nixl) -> None:
    """A READ that was under way when its session ended keeps its buffer; NIXL says when it's over, and tells nobody."""
    async with asyncio.timeout(10):
        while nixl.num_readers:
            await asyncio.sleep(0.01)


async def disconnect(kind: str, end: str, turns: int) -> None:
    """Hand a prompt off, and close every session of one end after so many turns of the event loop."""
    async with rig(kind) as both:
        task = asyncio.ensure_future(both.hand_off(prompt(101)))
        for _ in range(turns):
            await asyncio.sleep(0)
        if end == "prefill":
            await both.pool.close()
        else:
            await asyncio.gather(*(session.close() for session in tuple(both.server._sessions)))
        await asyncio.wait((task,))
        if not task.cancelled() and task.exception() is None:
            both.assert_arrived(prompt(101))


async def _serve(server: HandoffServer, channel: Channel) -> None:
    with suppress(ShoalError):
        await server.serve(channel)
