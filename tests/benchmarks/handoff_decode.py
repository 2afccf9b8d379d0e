"""Decode's process of handoff.py, and what both agree on; the other ends of its floors are here, too.

    python tests/benchmarks/handoff_decode.py TOKENS AT_ONCE        # handoff.py does

It opens leases for prompts of TOKENS tokens, AT_ONCE of them together.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
import traceback
from collections.abc import Coroutine
from functools import partial
from typing import Any, TypeVar

import grpc
import grpc.aio
import numpy as np
import torch
import uvloop

from shoal.config import load_config
from shoal.decode.sink import PoolSink
from shoal.engine.build import choose_copier
from shoal.handoff.base import SilentObserver, new_incarnation
from shoal.handoff.carriers.nixl.agent import Agent, Registered, is_installed, new_memory
from shoal.handoff.carriers.nixl.process import Nixl
from shoal.handoff.carriers.shm import ShmUnloader
from shoal.handoff.decode_session import Attach
from shoal.handoff.decode_side import HandoffDesk
from shoal.handoff.lease_table import LeaseTimes
from shoal.handoff.server import HandoffServer
from shoal.handoff.session import Identity
from shoal.handoff.slots import slot_offset
from shoal.handoff.terms import KvShape
from shoal.model.kv_layout import KvLayout, LayerGroup
from shoal.model.kv_pool import KvPool
from shoal.v1 import handoff_pb2 as pb
from shoal.v1.handoff_pb2_grpc import HandoffServiceServicer, add_HandoffServiceServicer_to_server
from shoal.wire.frames import to_response
from shoal.wire.handoff_messages import Credit, Envelope, RemoteSegment
from shoal.wire.options import HANDOFF_SERVER_OPTIONS

MIB = 1 << 20
# SmolLM2-135M in bfloat16, 20 of its layers kept; the prompt is as long as it takes.
LAYERS, KEPT, KV_HEADS, HEAD_DIM, BLOCK = 30, 20, 3, 64, 16
TOKEN_LAYER_BYTES = 2 * KV_HEADS * HEAD_DIM * 2
FRAME_BYTES, SLOT_BYTES, CREDIT_BYTES, STAGING_BYTES = MIB, 8 * MIB, 32 * MIB, 64 * MIB
SHAPE = KvShape("benchmark", LAYERS, KEPT, TOKEN_LAYER_BYTES)
TIMES = LeaseTimes(claim_timeout_s=60, ttl_s=30)
PORTS = (24100, 24199)
BARE_BYTES = "/shoal.benchmark/Bytes"
T = TypeVar("T")


def run_like_a_replica(main: Coroutine[Any, Any, T]) -> T:
    """On the event loop that Ray gives its workers, and with an allocator that keeps what is freed, as it does in whom
    has loaded a model: else each message's memory would go back to the system, and be faulted in again."""
    # glibc keeps blocks up to the largest that was freed, if that is below 32 MiB.
    large = np.empty(31 * MIB, np.uint8)
    del large
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


async def serve(num_tokens: int, num_at_once: int) -> None:
    """Tell both addresses on stdout; open a lease for each line on stdin, and answer it when it's committed."""
    torch.set_num_threads(1)
    layout = KvLayout((LayerGroup("all", 0, LAYERS),), KV_HEADS, HEAD_DIM, 2, BLOCK)
    num_blocks = layout.num_blocks_for(num_tokens)
    pool = KvPool(layout, num_at_once * num_blocks, dtype=torch.bfloat16, device=torch.device("cpu"))
    sink = PoolSink(pool, copier=choose_copier(load_config().decode))
    desk = HandoffDesk(sink, SHAPE, times=TIMES, credit_bytes=CREDIT_BYTES, observer=SilentObserver())
    nixl = Nixl(1 << 30)
    attach = Attach(ShmUnloader.attach, partial(nixl.attach, deadline_s=TIMES.ttl_s) if is_installed() else None)
    handoff = HandoffServer(desk, Identity(new_incarnation(), (SHAPE.plan_hash,)), attach)
    address = await handoff.listen("127.0.0.1", *PORTS)
    bare = grpc.aio.server(options=HANDOFF_SERVER_OPTIONS)
    add_HandoffServiceServicer_to_server(_Bare(), bare)
    service, method = BARE_BYTES.strip("/").split("/")
    bare.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {method: grpc.stream_stream_rpc_method_handler(_answer)}),)
    )
    port = bare.add_insecure_port("127.0.0.1:0")
    await bare.start()
    print(address, port, flush=True)
    reads = BareReads()
    # Not in order of their addresses: a pool that has served for a while.
    free = [int(block) for block in np.random.default_rng(0).permutation(num_at_once * num_blocks)]
    opened: set[asyncio.Task[None]] = set()

    async def hold(lease_id: bytes) -> None:
        blocks = [free.pop() for _ in range(num_blocks)]
        async with desk.open(lease_id, range(num_tokens), blocks) as lease:
            print("open", lease_id.hex(), flush=True)
            await lease.arrived()
        free.extend(blocks)
        print("arrived", lease_id.hex(), flush=True)

    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)

    def ended(task: asyncio.Task[None]) -> None:
        opened.discard(task)
        if (error := task.exception()) is not None:
            traceback.print_exception(error)
            os._exit(1)

    while line := await reader.readline():
        if line.startswith(b"read "):
            print(await asyncio.to_thread(reads, *line.split()[1:]), flush=True)
            continue
        task = asyncio.ensure_future(hold(bytes.fromhex(line.decode().strip())))
        opened.add(task)
        task.add_done_callback(ended)
    await handoff.close()
    await nixl.close()
    await bare.stop(None)
    sink.close()


async def _answer(_: object, context: object) -> None:
    credit = to_response(Envelope(1, Credit(bytes(16), 0, FRAME_BYTES))).SerializeToString()
    while isinstance(await context.read(), bytes):  # type: ignore[attr-defined]
        await context.write(credit)  # type: ignore[attr-defined]


class _Bare(HandoffServiceServicer):
    async def Session(self, request_iterator: object, context: object) -> None:  # type: ignore[override]
        credit = to_response(Envelope(1, Credit(bytes(16), 0, FRAME_BYTES)))
        while isinstance(await context.read(), pb.SessionRequest):  # type: ignore[attr-defined]
            await context.write(credit)  # type: ignore[attr-defined]


class BareReads:
    """``seconds = reads(agent, address, num_bytes)``: so many bytes by READs of a slot each, polled without a pause."""

    def __init__(self) -> None:
        self._peers: dict[bytes, tuple[Agent, str, Registered]] = {}

    def __call__(self, agent: bytes, address: bytes, num_bytes: bytes) -> float:
        if agent not in self._peers:
            ours = Agent()
            self._peers[agent] = (
                ours,
                ours.add_peer(bytes.fromhex(agent.decode())),
                ours.register(new_memory(SLOT_BYTES)),
            )
        ours, peer, target = self._peers[agent]
        slots = RemoteSegment(b"", int(address), STAGING_BYTES // SLOT_BYTES - 1, SLOT_BYTES, b"")
        started_s = time.perf_counter()
        for number in range(-(-int(num_bytes) // SLOT_BYTES)):
            size = min(SLOT_BYTES, int(num_bytes) - number * SLOT_BYTES)
            place = slots.address + slot_offset(slots, number % slots.num_slots)
            handle = ours.read(peer, place, target, size)
            while not ours.is_done(handle):
                pass
            ours.release(handle)
        return time.perf_counter() - started_s


if __name__ == "__main__":
    run_like_a_replica(serve(*map(int, sys.argv[1:])))
