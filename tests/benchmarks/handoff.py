"""The hand-off's throughput, each carrier against the floor that it stands on, interleaved in one run.

    python tests/benchmarks/handoff.py [--mib 36] [--at-once 1 4] [--rounds 20] [--json FILE]

Prefill is this process, decode another one on the same host, joined by gRPC on loopback. Everything counts: cutting,
checksums of both sides, copies out of the wire or the slot and into decode's pool, credits, seal and commit.

    inline   through the frames           floor: a bare grpc.aio stream of equal messages, each answered as credit is
                                          (``bare_bytes``: the same, if protobuf neither made nor read them)
    shm      through shared memory        floor: write to a mapping and copy out of it again, in one thread
    nixl     read by decode (UCX)         floor: as many bytes by NIXL's own READs of slots, one after another, between
                                          the same two processes; nothing is written, checked or copied on

Prompts are handed off alone, where each step waits for the one before, and ``--at-once`` so many, as from a pool that
has work: what they carry together, by the time that all of them take. The floors carry one prompt's bytes. The goal is
60 % of the first two floors, and 80 % of the third. Without NIXL its lines are missing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio
import handoff_decode
import numpy as np
from handoff_decode import (
    BARE_BYTES,
    FRAME_BYTES,
    KEPT,
    LAYERS,
    MIB,
    SHAPE,
    SLOT_BYTES,
    STAGING_BYTES,
    TIMES,
    TOKEN_LAYER_BYTES,
    run_like_a_replica,
)

from shoal.config import load_config
from shoal.engine.build import choose_copier
from shoal.engine.runner import portions
from shoal.handoff.base import new_incarnation
from shoal.handoff.carriers.nixl.agent import Agent, is_installed, new_memory
from shoal.handoff.carriers.nixl.process import Nixl
from shoal.handoff.carriers.shm import FOLDER, ShmLoader
from shoal.handoff.channels.grpc import dial
from shoal.handoff.offer import Staging
from shoal.handoff.prefill_side import PromptClaim
from shoal.handoff.session import Identity
from shoal.handoff.session_pool import SessionPool
from shoal.model.kv_rows import KvRows
from shoal.v1 import handoff_pb2 as pb
from shoal.v1.handoff_pb2_grpc import HandoffServiceStub
from shoal.wire.frames import to_request
from shoal.wire.handoff_messages import Carrier, Chunk, Envelope
from shoal.wire.options import HANDOFF_CHANNEL_OPTIONS

FLOORS = {"inline": "bare_stream", "shm": "bare_copy", "nixl": "bare_read"}
GOALS = {"inline": 0.6, "shm": 0.6, "nixl": 0.8}
CHUNK_TOKENS = 512
T = TypeVar("T")
Way = Callable[[], Awaitable[float]]


class Decode:
    """The other process, as its pipes have it: a lease's lines come when they come, others as they were asked for."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._others: asyncio.Queue[str] = asyncio.Queue()
        self._of_leases: dict[str, asyncio.Future[None]] = {}
        self._reading = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while raw := await self._process.stdout.readline():
            line = raw.decode().strip()
            if line.startswith(("open ", "arrived ")):
                self._of_leases.pop(line).set_result(None)
            else:
                self._others.put_nowait(line)

    async def line(self) -> str:
        return await self._unless_dead(self._others.get())

    async def told(self, what: str, lease_id: bytes) -> None:
        """``what`` has happened to the lease: "open" or "arrived"."""
        told = self._of_leases.setdefault(f"{what} {lease_id.hex()}", asyncio.get_running_loop().create_future())
        await self._unless_dead(told)

    async def _unless_dead(self, saying: Awaitable[T]) -> T:
        said = asyncio.ensure_future(saying)
        await asyncio.wait((said, self._reading), return_when=asyncio.FIRST_COMPLETED)
        if not said.done():
            raise SystemExit("error: the decode process has died")
        return said.result()

    async def open(self, lease_id: bytes) -> asyncio.Task[None]:
        """Returns what ends when it has arrived."""
        arrived = asyncio.ensure_future(self.told("arrived", lease_id))
        self.say(lease_id.hex())
        await self.told("open", lease_id)
        return arrived

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())


@asynccontextmanager
async def decode_process(num_tokens: int, num_at_once: int) -> AsyncIterator[Decode]:
    command = [sys.executable, handoff_decode.__file__, str(num_tokens), str(num_at_once)]
    process = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield Decode(process)
    finally:
        process.kill()
        await process.wait()


def hand_off(
    decode: Decode, pool: SessionPool, address: str, num_tokens: int, carrier: Carrier, num_at_once: int
) -> Way:
    """So many prompts, each as ``PrefillWorker`` ships it, from the first one's first byte to the last one's commit."""
    rng = np.random.default_rng(0)
    kept = tuple(rng.integers(0, 256, (KEPT, num_tokens, TOKEN_LAYER_BYTES), dtype=np.uint8))
    pieces: list[tuple[int, int, int, int, KvRows | memoryview]] = []
    for start in range(0, num_tokens - 1, CHUNK_TOKENS):
        end = min(start + CHUNK_TOKENS, num_tokens - 1)
        pieces.append((start, end, 0, KEPT, KvRows(kept, np.arange(start, end))))
        layer_bytes = (end - start) * TOKEN_LAYER_BYTES
        for layers in portions(range(KEPT, LAYERS), layer_bytes):
            projected = rng.integers(0, 256, len(layers) * layer_bytes, dtype=np.uint8)
            pieces.append((start, end, layers.start, layers.stop, memoryview(projected)))  # type: ignore[arg-type]

    async def ship(claim: PromptClaim) -> None:
        for piece in pieces:
            await claim.send(*piece)
        await claim.seal(boundary_token_id=num_tokens - 1, queue_s=0, prefill_s=0)

    async def once() -> float:
        lease_ids = [os.urandom(16) for _ in range(num_at_once)]
        arrived = [await decode.open(lease_id) for lease_id in lease_ids]
        session = await pool.get(address)
        assert session.carrier is carrier, session.carrier_reason
        async with AsyncExitStack() as stack:
            claims = [await stack.enter_async_context(session.claim(lease_id)) for lease_id in lease_ids]
            started_s = time.perf_counter()
            await asyncio.gather(*map(ship, claims))
            ended_s = time.perf_counter()
        await asyncio.gather(*arrived)
        return ended_s - started_s

    return once


def bare_stream(port: int, num_bytes: int, *, are_messages: bool = True) -> Way:
    """As many bytes in messages like the hand-off's, and each answered with a message like its credit; or in plain
    bytes both ways."""

    async def once() -> float:
        message = to_request(Envelope(1, Chunk(bytes(16), 0, 0, 1, 0, 1, 0, bytes(FRAME_BYTES))))
        request = message if are_messages else message.SerializeToString()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=HANDOFF_CHANNEL_OPTIONS) as channel:
            session = (
                HandoffServiceStub(channel).Session if are_messages else channel.stream_stream(BARE_BYTES, None, None)
            )
            call: Any = session()  # type: ignore[call-arg]
            num_messages = -(-num_bytes // FRAME_BYTES)
            took_s = [await _exchange(call, request, num_messages) for _ in range(2)]
            call.cancel()
        return took_s[1]  # the first one connected, and widened the windows, as a session's first prompts do

    return once


async def _exchange(call: Any, request: pb.SessionRequest | bytes, num_messages: int) -> float:
    started_s = time.perf_counter()
    writing = asyncio.ensure_future(_write(call, request, num_messages))
    for _ in range(num_messages):
        await call.read()
    await writing
    return time.perf_counter() - started_s


async def _write(call: Any, request: pb.SessionRequest | bytes, num_messages: int) -> None:
    for _ in range(num_messages):
        await call.write(request)


def bare_copy(num_bytes: int) -> Way:
    """As many bytes into a mapping of the size of a segment, frame by frame, and out of it into private memory."""
    with tempfile.TemporaryFile(dir=FOLDER) as file:
        file.truncate(STAGING_BYTES)
        mapping = mmap.mmap(file.fileno(), STAGING_BYTES, mmap.MAP_SHARED | mmap.MAP_POPULATE)
    source = memoryview(np.random.default_rng(0).integers(0, 256, num_bytes, dtype=np.uint8))  # type: ignore[arg-type]
    target = memoryview(bytearray(num_bytes))

    async def once() -> float:
        view = memoryview(mapping)
        started_s = time.perf_counter()
        for start in range(0, num_bytes, FRAME_BYTES):
            size = min(FRAME_BYTES, num_bytes - start)
            at = start % STAGING_BYTES
            view[at : at + size] = source[start : start + size]
            target[start : start + size] = view[at : at + size]
        return time.perf_counter() - started_s

    return once


@asynccontextmanager
async def bare_read(decode: Decode, num_bytes: int) -> AsyncIterator[Way]:
    """The other process reads; this one only does what lets it."""
    agent = Agent()
    memory = new_memory(STAGING_BYTES)
    registered = agent.register(memory)
    metadata = agent.metadata.hex()
    is_open = True

    def progress() -> None:
        while is_open:
            if is_reading.wait(0.1):
                agent.progress()

    is_reading = threading.Event()
    progressing = asyncio.ensure_future(asyncio.to_thread(progress))

    async def once() -> float:
        is_reading.set()
        decode.say(f"read {metadata} {registered.address} {num_bytes}")
        took_s = float(await decode.line())
        is_reading.clear()
        return took_s

    try:
        yield once
    finally:
        is_open = False
        await progressing


async def measure(num_tokens: int, at_once: Sequence[int], num_rounds: int) -> dict[str, object]:
    num_bytes = (num_tokens - 1) * LAYERS * TOKEN_LAYER_BYTES
    nixl, copier = Nixl(0), choose_copier(load_config().prefill)
    stagings = {
        Carrier.INLINE: Staging(copier=copier),
        Carrier.SHM: Staging(partial(ShmLoader.create, SLOT_BYTES, STAGING_BYTES, copier=copier)),
        Carrier.NIXL: Staging(remote=partial(nixl.open_loader, SLOT_BYTES, STAGING_BYTES, copier)),
    }
    if not is_installed():
        del stagings[Carrier.NIXL]
    async with AsyncExitStack() as stack:
        decode = await stack.enter_async_context(decode_process(num_tokens, max(at_once)))
        address, port = (await decode.line()).split()
        identity = Identity(new_incarnation(), (SHAPE.plan_hash,))
        pools = {
            carrier: SessionPool(dial, identity, ttl_s=TIMES.ttl_s, max_frame_bytes=FRAME_BYTES, staging=staging)
            for carrier, staging in stagings.items()
        }
        ways: dict[str, Way] = {
            **{
                _name(carrier, number): hand_off(decode, pool, address, num_tokens, carrier, number)
                for carrier, pool in pools.items()
                for number in at_once
            },
            "bare_stream": bare_stream(int(port), num_bytes),
            "bare_bytes": bare_stream(int(port), num_bytes, are_messages=False),
            "bare_copy": bare_copy(num_bytes),
        }
        if Carrier.NIXL in stagings:
            ways["bare_read"] = await stack.enter_async_context(bare_read(decode, num_bytes))
        seconds = await _interleaved(ways, num_rounds)
        await asyncio.gather(*(pool.close() for pool in pools.values()))
    await nixl.close()
    return _result(seconds, num_bytes, at_once) | {"num_tokens": num_tokens, "num_rounds": num_rounds}


def _name(carrier: str, num_at_once: int) -> str:
    return str(carrier) if num_at_once == 1 else f"{carrier}, {num_at_once} at once"


async def _interleaved(ways: dict[str, Way], num_rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(num_rounds + 2):
        for name, way in ways.items():
            took_s = await way()
            if number >= 2:  # the first ones are for caches and pages
                seconds[name].append(took_s)
    return seconds


def _result(seconds: dict[str, list[float]], num_bytes: int, at_once: Sequence[int]) -> dict[str, object]:
    prompts = {_name(carrier, number): number for carrier in FLOORS for number in at_once}
    median_s = {name: statistics.median(values) / prompts.get(name, 1) for name, values in seconds.items()}
    shares = {
        _name(carrier, number): median_s[floor] / median_s[_name(carrier, number)]
        for carrier, floor in FLOORS.items()
        for number in at_once
        if floor in median_s
    }
    return {
        "num_bytes": num_bytes,
        "num_cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "median_ms_per_prompt": {name: round(value * 1e3, 2) for name, value in median_s.items()},
        "best_ms_per_prompt": {
            name: round(min(values) / prompts.get(name, 1) * 1e3, 2) for name, values in seconds.items()
        },
        "gib_per_s": {name: round(num_bytes / value / (1 << 30), 2) for name, value in median_s.items()},
        "floors": FLOORS,
        "share_of_floor": {name: round(value, 3) for name, value in shares.items()},
        "goals": GOALS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mib", type=int, default=36, help="K/V of one prompt")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 4], help="prompts that are on their way together")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the result there, too")
    options = parser.parse_args()
    num_tokens = 1 + max(1, options.mib * MIB // (LAYERS * TOKEN_LAYER_BYTES))
    result = json.dumps(run_like_a_replica(measure(num_tokens, options.at_once, options.rounds)), indent=2)
    print(result)
    if options.json is not None:
        options.json.write_text(result + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
