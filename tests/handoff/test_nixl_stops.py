"""A prefill process that stops, or dies, while decode reads from it through NIXL: over TCP, where that is noticed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
from kv_prompts import PLAN, SHAPE, ArraySink, lease_id, prompt
from transfer_helpers import PORTS, needs_nixl, send_all

from shoal.errors import LeaseLost, PeerGone
from shoal.handoff.carriers.nixl.loader import NixlLoader
from shoal.handoff.carriers.nixl.process import Nixl
from shoal.handoff.channels.grpc import dial
from shoal.handoff.decode_session import Attach
from shoal.handoff.decode_side import HandoffDesk
from shoal.handoff.lease_table import LeaseTimes
from shoal.handoff.offer import Staging
from shoal.handoff.server import HandoffServer
from shoal.handoff.session import Identity
from shoal.handoff.session_pool import SessionPool
from shoal.wire.handoff_messages import Carrier

pytestmark = needs_nixl

PREFILL = """
import asyncio, sys
from shoal.handoff.carriers.nixl.process import Nixl
from shoal.handoff.channels.grpc import dial
from shoal.handoff.offer import Staging
from shoal.handoff.session import Identity
from shoal.handoff.session_pool import SessionPool
from kv_prompts import PLAN, TOKEN_BYTES

async def main(address, new_id, what_then):
    nixl = Nixl(0)
    loaders = []
    # NIXL's Python imports torch, which a replica has done long before its first session: it's no part of the greeting.
    (await nixl.open_loader(1 << 20, 1 << 22)).close()

    async def stage():
        loaders.append(await nixl.open_loader(1 << 20, 1 << 22))
        return loaders[-1]

    pool = SessionPool(dial, Identity(9, (PLAN,)), ttl_s=5.0, max_frame_bytes=1024, staging=Staging(remote=stage))
    session = await pool.get(address)
    async with session.claim(bytes.fromhex(new_id)) as claim:
        # Over TCP, whoever reads gets no answer from here on, as if this process had stopped in the middle of it.
        loaders[0].poll = lambda now_s: None
        if what_then == "stay":
            session._ended = lambda error: None
        print(session.carrier, flush=True)
        await claim.send(0, 4096, 0, 4, memoryview(bytes(4096 * 4 * TOKEN_BYTES)))
        await asyncio.sleep(60)

asyncio.run(main(*sys.argv[1:]))
"""
SLOT_BYTES = 1 << 20
BUFFER_BYTES = SLOT_BYTES + 64


@asynccontextmanager
async def silent_prefill(
    address: str, new_id: bytes, *, stays: bool = False
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Another process that has claimed ``new_id``, and of whose first chunk nothing will ever come.

    It ends with its session; or it ``stays`` and frees nothing.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = ["-c", PREFILL, address, new_id.hex(), "stay" if stays else "end"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdout=asyncio.subprocess.PIPE, env=environment
    )
    try:
        assert process.stdout is not None
        assert (await asyncio.wait_for(process.stdout.readline(), 60)).decode().strip() == Carrier.NIXL
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


class Decode:
    """A decode replica that reads over TCP: nothing comes from a process that doesn't run. ``max_readers`` may be
    under way or retired."""

    def __init__(self, *, ttl_s: float, deadline_s: float, max_readers: int = 9) -> None:
        self.sink = ArraySink()
        times = LeaseTimes(claim_timeout_s=30.0, ttl_s=ttl_s)
        self.desk = HandoffDesk(self.sink, SHAPE, times=times, credit_bytes=1 << 20)
        self._retired: asyncio.Queue[int] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        told = partial(loop.call_soon_threadsafe, self._retired.put_nowait)
        self.nixl = Nixl(4 * BUFFER_BYTES * max_readers, told)  # type: ignore[arg-type]
        attach = Attach(remote=partial(self.nixl.attach, deadline_s=deadline_s))
        self.server = HandoffServer(self.desk, Identity(8, (PLAN,)), attach)
        self.address = ""

    async def retired(self) -> int:
        """How many bytes are, the next time that this changes."""
        return await asyncio.wait_for(self._retired.get(), 60)

    async def reading(self) -> None:
        """Wait until a READ is under way."""
        while not any(reader.is_reading for reader in self.nixl._retired._taken):
            await asyncio.sleep(0.01)

    async def carrier_for(self, nixl: Nixl) -> Carrier:
        """Of a new session, over which a prompt is handed off."""

        async def stage() -> NixlLoader:
            return await nixl.open_loader(SLOT_BYTES, 1 << 22)

        identity, new_id, wanted = Identity(7, (PLAN,)), lease_id(), prompt()
        pool = SessionPool(dial, identity, ttl_s=5.0, max_frame_bytes=1024, staging=Staging(remote=stage))
        session = await pool.get(self.address)
        async with self.desk.open(new_id, wanted.token_ids, wanted.blocks) as lease, session.claim(new_id) as claim:
            await send_all(claim, wanted)
            await claim.seal(boundary_token_id=wanted.token_ids[-1], queue_s=0, prefill_s=0)
            await lease.arrived()
        await pool.close()
        return session.carrier


@pytest.fixture
async def make_decode(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Awaitable[Decode]]]:
    monkeypatch.setenv("UCX_TLS", "tcp")
    made: list[Decode] = []

    async def make(**options: float) -> Decode:
        made.append(Decode(**options))  # type: ignore[arg-type]
        (await made[-1].nixl.open_loader(SLOT_BYTES, 1 << 22)).close()  # loads what a replica has loaded long before
        made[-1].address = await made[-1].server.listen("127.0.0.1", *PORTS)
        return made[-1]

    yield make
    for decode in made:
        await decode.server.close()
        await decode.nixl.close()
        assert decode.nixl.num_readers == 0
        assert decode.desk.table.num_open == 0


async def test_a_read_that_is_overdue_ends_the_session_and_its_buffer_is_retired_until_it_has_ended(
    make_decode: Callable[..., Awaitable[Decode]],
) -> None:
    new_id, wanted = lease_id(), prompt(4097)
    decode, other = await make_decode(ttl_s=5.0, deadline_s=1.0, max_readers=1), Nixl(0)
    async with (
        decode.desk.open(new_id, wanted.token_ids, wanted.blocks) as lease,
        silent_prefill(decode.address, new_id, stays=True) as process,
    ):
        with pytest.raises(PeerGone, match="a READ has taken longer than 1 s"):
            await lease.arrived()
        assert await decode.retired() == BUFFER_BYTES
        assert not decode.sink.written
        assert await decode.carrier_for(other) is Carrier.INLINE  # more might have to be retired than may be
        process.send_signal(signal.SIGKILL)
        assert await decode.retired() == 0
        assert await decode.carrier_for(other) is Carrier.NIXL
    await other.close()


@pytest.mark.slow
@pytest.mark.parametrize("awakes", [True, False])
async def test_what_a_frozen_prefill_leaves_undone_is_retired_and_the_prompt_comes_from_another(
    make_decode: Callable[..., Awaitable[Decode]], awakes: bool
) -> None:
    new_id, wanted = lease_id(), prompt(4097)
    decode, other = await make_decode(ttl_s=5.0, deadline_s=600.0), Nixl(0)
    async with (
        decode.desk.open(new_id, wanted.token_ids, wanted.blocks) as lease,
        silent_prefill(decode.address, new_id) as process,
    ):
        await decode.reading()
        process.send_signal(signal.SIGSTOP)
        with pytest.raises((PeerGone, LeaseLost), match=r"nothing was heard|nobody renewed"):
            await lease.arrived()
        assert await decode.retired() == BUFFER_BYTES
        assert await decode.carrier_for(other) is Carrier.NIXL
        process.send_signal(signal.SIGCONT if awakes else signal.SIGKILL)
        assert await decode.retired() == 0
    await other.close()


async def test_a_prefill_that_is_killed_in_the_middle_of_a_read_leaves_nothing(
    make_decode: Callable[..., Awaitable[Decode]],
) -> None:
    new_id, wanted = lease_id(), prompt(4097)
    decode = await make_decode(ttl_s=5.0, deadline_s=600.0)
    async with (
        decode.desk.open(new_id, wanted.token_ids, wanted.blocks) as lease,
        silent_prefill(decode.address, new_id) as process,
    ):
        await decode.reading()
        process.send_signal(signal.SIGKILL)
        with pytest.raises(PeerGone):
            await lease.arrived()
        assert not decode.sink.written
        while decode.nixl.num_readers:
            await asyncio.sleep(0.01)
