"""Processes that are killed, or disconnect, while their payload goes through shared memory."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from kv_prompts import PLAN, lease_id, prompt
from transfer_helpers import MAX_FRAME_BYTES, disconnect, rig, send_all

from shoal.errors import PeerGone
from shoal.handoff.base import new_incarnation
from shoal.handoff.carriers.shm import ShmLoader
from shoal.handoff.channels.grpc import dial
from shoal.handoff.offer import Staging
from shoal.handoff.session import Identity
from shoal.handoff.session_pool import SessionPool
from shoal.wire.handoff_messages import Carrier

PREFILL = """
import asyncio, sys
from functools import partial
from pathlib import Path
from shoal.handoff.carriers.shm import ShmLoader
from shoal.handoff.channels.grpc import dial
from shoal.handoff.offer import Staging
from shoal.handoff.session import Identity
from shoal.handoff.session_pool import SessionPool
from kv_prompts import PLAN, prompt
from transfer_helpers import send_all

async def main(address, folder, new_id):
    stage = partial(ShmLoader.create, 1024, 1 << 18, Path(folder))
    pool = SessionPool(dial, Identity(9, (PLAN,)), ttl_s=5.0, max_frame_bytes=1024, staging=Staging(stage))
    session = await pool.get(address)
    async with session.claim(bytes.fromhex(new_id)) as claim:
        await send_all(claim, prompt(), until=20)
        print(session.carrier, flush=True)
        await asyncio.sleep(60)

asyncio.run(main(*sys.argv[1:]))
"""

DECODE = """
import asyncio, sys
from functools import partial
from pathlib import Path
from shoal.handoff.carriers.shm import ShmUnloader
from shoal.handoff.decode_session import Attach
from shoal.handoff.decode_side import HandoffDesk
from shoal.handoff.server import HandoffServer
from shoal.handoff.session import Identity
from kv_prompts import ArraySink, PLAN, SHAPE, prompt
from transfer_helpers import CREDIT_BYTES, PORTS, TIMES

async def main(folder, new_id):
    sink = ArraySink()
    sink.gate.clear()
    desk = HandoffDesk(sink, SHAPE, times=TIMES, credit_bytes=CREDIT_BYTES)
    server = HandoffServer(desk, Identity(8, (PLAN,)), Attach(partial(ShmUnloader.attach, folder=Path(folder))))
    async with desk.open(bytes.fromhex(new_id), prompt().token_ids, (0,)):
        print(await server.listen("127.0.0.1", *PORTS), flush=True)
        await asyncio.sleep(60)

asyncio.run(main(*sys.argv[1:]))
"""


@asynccontextmanager
async def child(program: str, *arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Another process, and the first line that it printed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, *arguments, stdout=asyncio.subprocess.PIPE, env=environment
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 60)
        yield process, line.decode().strip()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_a_prefill_that_is_killed_leaves_no_memory() -> None:
    new_id = lease_id()
    async with rig("grpc+shm") as both, both.open(new_id, prompt()) as lease:
        async with child(PREFILL, both.address, str(both.folder), new_id.hex()) as (process, carrier):
            assert carrier == Carrier.SHM
            assert not list(both.folder.iterdir())
            process.send_signal(signal.SIGKILL)
            with pytest.raises(PeerGone):
                await asyncio.wait_for(lease.arrived(), 10)
        await both.hand_off(prompt(seed=1))


async def test_a_decode_that_is_killed_frees_the_slots_that_it_was_reading(tmp_path: Path) -> None:
    loaders: list[ShmLoader] = []

    def stage() -> ShmLoader:
        loaders.append(ShmLoader.create(MAX_FRAME_BYTES, 1 << 18, tmp_path))
        return loaders[-1]

    new_id = lease_id()
    identity = Identity(new_incarnation(), (PLAN,))
    pool = SessionPool(dial, identity, ttl_s=5.0, max_frame_bytes=MAX_FRAME_BYTES, staging=Staging(stage))
    async with child(DECODE, str(tmp_path), new_id.hex()) as (process, address):
        session = await pool.get(address)
        assert session.carrier is Carrier.SHM
        async with session.claim(new_id) as claim:
            sending = asyncio.ensure_future(send_all(claim, prompt()))
            while loaders[0].num_lent < 4:  # all that the credit allows: nothing is copied there
                await asyncio.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            with pytest.raises(PeerGone):
                await asyncio.wait_for(sending, 10)
        assert session.is_over
        assert loaders[0]._memory.closed
    assert not os.listdir(tmp_path)  # noqa: PTH208 - names say it all
    await pool.close()


@pytest.mark.parametrize("turns", [0, 1, 3, 8, 21, 55, 144])
@pytest.mark.parametrize("end", ["prefill", "decode"])
async def test_whoever_disconnects_at_any_moment_leaves_no_memory(end: str, turns: int) -> None:
    await disconnect("grpc+shm", end, turns)
