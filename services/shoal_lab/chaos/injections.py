"""The faults: each is a block, within which it lasts, given the replicas that were lost to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal_lab.chaos.cases import Case
from shoal_lab.chaos.load import Load
from shoal_lab.chaos.proxy import CLEAR, LinkFault
from shoal_lab.chaos.switchboard import FrameFault
from shoal_lab.chaos.victim import Victim
from shoal_lab.chaos.waiting import until

if TYPE_CHECKING:
    from shoal.cluster.directory import Entry
    from shoal.wire.messages import Role

FRAME_RATE = 0.1
NUM_RESETS = 4
BURST_TIMES = 5
_HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Scene:
    """What a fault may touch. ``burst`` are long requests beyond the load; ``skip_layers`` is the other plan's;
    ``undo_within_s`` what the way back from there may take."""

    victim: Victim
    load: Load
    burst: tuple[Case, ...]
    skip_layers: int
    undo_within_s: float


Lost = tuple["Entry", ...]
Inject = Callable[[Scene], AbstractAsyncContextManager[Lost]]


@asynccontextmanager
async def killed(role: Role, number: int | None, scene: Scene) -> AsyncIterator[Lost]:
    lost = (await scene.victim.busiest(role))[:number]
    scene.victim.kill(lost)
    yield lost


@asynccontextmanager
async def on_link(fault: LinkFault, scene: Scene) -> AsyncIterator[Lost]:
    scene.victim.proxy.fault = fault
    try:
        yield ()
    finally:
        scene.victim.proxy.fault = CLEAR


@asynccontextmanager
async def reset(scene: Scene) -> AsyncIterator[Lost]:
    for _ in range(NUM_RESETS):
        scene.victim.proxy.reset()
        await asyncio.sleep(1)
    yield ()


@asynccontextmanager
async def half_open(scene: Scene) -> AsyncIterator[Lost]:
    scene.victim.proxy.forget()
    yield ()


@asynccontextmanager
async def on_frames(fault: FrameFault, scene: Scene) -> AsyncIterator[Lost]:
    scene.victim.switchboard.set_frame_fault(fault, FRAME_RATE)
    try:
        yield ()
    finally:
        scene.victim.switchboard.set_frame_fault(FrameFault.NONE, 0)


@asynccontextmanager
async def burst(scene: Scene) -> AsyncIterator[Lost]:
    await asyncio.gather(*(scene.load.ask(case) for case in BURST_TIMES * scene.burst))
    yield ()


@asynccontextmanager
async def clock_jump(scene: Scene) -> AsyncIterator[Lost]:
    """An hour on, then two back, so that it's an hour late."""
    try:
        for offset_s in (_HOUR_S, -_HOUR_S):
            scene.victim.switchboard.clock_offset_s = offset_s
            await asyncio.sleep(scene.victim.hold_s / 2)
        yield ()
    finally:
        scene.victim.switchboard.clock_offset_s = 0


@asynccontextmanager
async def paused(role: Role, scene: Scene) -> AsyncIterator[Lost]:
    with scene.victim.paused((await scene.victim.busiest(role))[:1]):
        yield ()


@asynccontextmanager
async def disk_full(scene: Scene) -> AsyncIterator[Lost]:
    """Nobody can write a file, and a replica of each pool has to start."""
    await scene.victim.fill_disk(is_full=True)
    try:
        lost = tuple([(await scene.victim.busiest(role))[0] for role in ("prefill", "decode")])
        scene.victim.kill(lost)
        await until(scene.victim.is_whole)
        yield lost
    finally:
        await scene.victim.fill_disk(is_full=False)


@asynccontextmanager
async def rolled(scene: Scene) -> AsyncIterator[Lost]:
    """To the other plan, and back."""
    try:
        await scene.victim.roll(skip_layers=scene.skip_layers)
        yield ()
    finally:
        # Where the time for both is up already, the way back has as much once more.
        async with asyncio.timeout(scene.undo_within_s):
            await scene.victim.roll(skip_layers=None)
