"""What stays until a test lets it go on: frames on their way, copies into blocks, reads of staged payload."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from fake_clock import settle
from kv_prompts import NUM_LAYERS, STATE_BYTES, TOKEN_BYTES, Prompt, project
from remote_memory import FakeUnloader

from shoal.errors import PeerGone
from shoal.handoff.base import crc32c
from shoal.handoff.channels.memory import Rule, memory_pair
from shoal.wire.handoff_messages import Chunk, Envelope, StagedPayload, WireMode

if TYPE_CHECKING:
    from handoff_pools import DecodeProcess, PrefillProcess

NUM_BLOCKS, BLOCK_TOKENS = 12, 4


class Gates:
    """What waits for the test to let it go on, oldest first."""

    def __init__(self) -> None:
        self.waiting: list[asyncio.Event] = []

    async def __call__(self) -> None:
        event = asyncio.Event()
        self.waiting.append(event)
        try:
            await event.wait()
        finally:
            self.waiting = [other for other in self.waiting if other is not event]

    def open(self, place: int = 0) -> None:
        self.waiting.pop(place % len(self.waiting)).set()


class Wire:
    """A channel whose frames stay on their way: ``under_way`` has those to decode, then those to prefill.

    ``rules`` are what befalls them when they are sent.
    """

    def __init__(self, owner: PrefillProcess, peer: DecodeProcess, rules: list[Rule]) -> None:
        self.owner, self.peer = owner, peer
        self._rules = rules
        self.prefill, self.decode = memory_pair(
            prefill_sends=partial(self._hold, 0), decode_sends=partial(self._hold, 1)
        )
        self.under_way: tuple[list[Envelope], list[Envelope]] = ([], [])
        self.is_cut = [False, False]
        self._delivers = False

    def has_greeted(self, way: int) -> bool:
        """Whoever receives that way knows who sends."""
        sessions = self.owner.sessions._living() if way else tuple(self.peer.server._sessions)
        end = self.prefill if way else self.decode
        return any(session._channel is end and session._peer_incarnation is not None for session in sessions)

    async def deliver(self, way: int, envelope: Envelope) -> None:
        self._delivers = True
        with suppress(PeerGone):  # closed meanwhile
            await (self.prefill, self.decode)[way].send(envelope)
        self._delivers = False
        await settle()

    def cut(self, *ways: int) -> None:
        """Nothing goes that way any more, and nobody is told."""
        for way in ways:
            self.is_cut[way] = True
            self.under_way[way].clear()

    def _hold(self, way: int, envelope: Envelope) -> Iterable[Envelope]:
        if self._delivers:
            return (envelope,)
        if not self.is_cut[way]:
            sent = [envelope]
            for rule in self._rules:
                sent = [left for each in sent for left in rule(each)]
            self.under_way[way].extend(sent)
        return ()


class Blocks:
    """A decode pool's memory, ``[blocks, layers, tokens, bytes]``; each write is of whoever holds the blocks."""

    def __init__(self) -> None:
        self.memory = np.zeros((NUM_BLOCKS, NUM_LAYERS, BLOCK_TOKENS, TOKEN_BYTES), np.uint8)
        self.holders: dict[int, bytes] = {}
        self.copies = Gates()
        self.strays: list[bytes] = []

    async def write(self, blocks: Iterable[int], chunk: Chunk, is_there: Callable[[], bool]) -> int | None:
        blocks = tuple(blocks)
        await self.copies()
        if {self.holders.get(block) for block in blocks} != {chunk.lease_id}:
            self.strays.append(chunk.lease_id)
        layers, tokens = chunk.layer_end - chunk.layer_start, chunk.token_end - chunk.token_start
        rows = np.frombuffer(chunk.payload, np.uint8)
        if chunk.wire_mode is WireMode.HIDDEN:
            rows = project(rows.reshape(tokens, STATE_BYTES))
        for row, token in enumerate(range(chunk.token_start, chunk.token_end)):
            place = self.memory[blocks[token // BLOCK_TOKENS], :, token % BLOCK_TOKENS]
            place[chunk.layer_start : chunk.layer_end] = rows.reshape(layers, tokens, TOKEN_BYTES)[:, row]
        return crc32c(chunk.payload) if is_there() else None

    def holds(self, wanted: Prompt) -> bool:
        """Whether all that was to be shipped is there, byte for byte."""
        found = np.concatenate([self.memory[block] for block in wanted.blocks], axis=1)
        shipped = slice(wanted.num_present, len(wanted.token_ids) - 1)
        return bool((found[:, shipped] == wanted.kv[:, shipped]).all())


class SlowUnloader(FakeUnloader):
    """Reads when the test says so."""

    def __init__(self, loader: object, reads: Gates, wants: Callable[[Chunk], bool]) -> None:
        super().__init__(loader)  # type: ignore[arg-type]
        self._reads, self._wants = reads, wants
        self.tasks: set[asyncio.Task[None]] = set()
        self.torn: list[Chunk] = []

    def unload(self, chunk: Chunk, staged: StagedPayload, arrived: Callable[[Chunk], None]) -> None:
        task = asyncio.get_running_loop().create_task(self._read_later(chunk, staged, arrived))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _read_later(self, chunk: Chunk, staged: StagedPayload, arrived: Callable[[Chunk], None]) -> None:
        await self._reads()

        def told(found: Chunk) -> None:
            if not found.payload and self._wants(chunk):
                self.torn.append(chunk)  # somebody else's slot by now, though the lease waits for it
            arrived(found)

        self._read(chunk, staged, told)
