"""Prompts with random K/V, the shape that all hand-off tests give them, and a sink of arrays that they land in."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shoal.handoff.base import crc32c
from shoal.handoff.frames import Piece
from shoal.handoff.terms import KvShape
from shoal.wire.handoff_messages import Chunk, WireMode

PLAN = "plan-a"
NUM_LAYERS = 4
NUM_SHALLOW = 3
TOKEN_BYTES = 32
STATE_BYTES = 16
SHAPE = KvShape(PLAN, NUM_LAYERS, NUM_SHALLOW, TOKEN_BYTES, STATE_BYTES)
_ids = itertools.count(1)


def lease_id() -> bytes:
    return next(_ids).to_bytes(16, "big")


@dataclass(frozen=True)
class Prompt:
    """Random token ids and K/V ``[layers, tokens, bytes]`` for all but the boundary token.

    K/V that are projected are here their state, twice.
    """

    token_ids: tuple[int, ...]
    kv: npt.NDArray[np.uint8]
    blocks: tuple[int, ...]
    num_present: int = 0

    @property
    def num_shipped(self) -> int:
        return len(self.token_ids) - 1 - self.num_present

    @property
    def states(self) -> npt.NDArray[np.uint8]:
        return self.kv[NUM_SHALLOW, :, :STATE_BYTES]


def prompt(num_tokens: int = 41, *, num_present: int = 0, seed: int = 0) -> Prompt:
    rng = np.random.default_rng(seed)
    ids = tuple(int(value) for value in rng.integers(0, 1000, num_tokens))
    kv = rng.integers(0, 256, (NUM_LAYERS, num_tokens - 1, TOKEN_BYTES), dtype=np.uint8)
    kv[NUM_SHALLOW:] = project(kv[NUM_SHALLOW, :, :STATE_BYTES])
    return Prompt(ids, kv, (seed, seed + 1000), num_present)


def piece_of(chunk: Chunk) -> Piece:
    """What ``chunk`` is before it's loaded."""
    return Piece(
        chunk.lease_id, chunk.seq, chunk.token_start, chunk.token_end, chunk.layer_start, chunk.layer_end, chunk.payload
    )


def project(states: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """K/V ``[1, tokens, bytes]`` of states ``[tokens, bytes]``."""
    return np.concatenate([states, states], axis=-1)[None]


class ArraySink:
    """Blocks are arrays ``[layers, tokens, bytes]``. ``gate`` holds copies up; ``fails`` makes them raise."""

    def __init__(self) -> None:
        self.arrays: dict[tuple[int, ...], npt.NDArray[np.uint8]] = {}
        self.written: Counter[tuple[int, ...]] = Counter()
        self.gate = asyncio.Event()
        self.gate.set()
        self.started = asyncio.Event()
        self.fails: Exception | None = None
        self.writing: Counter[tuple[int, ...]] = Counter()
        self.max_writing = 0

    async def write(self, blocks: Sequence[int], chunk: Chunk, is_there: Callable[[], bool]) -> int | None:
        key = tuple(blocks)
        self.writing[key] += 1
        self.max_writing = max(self.max_writing, self.writing[key])
        self.started.set()
        try:
            await self.gate.wait()
            if self.fails is not None:
                raise self.fails
            if not is_there():
                return None
            layers, tokens = chunk.layer_end - chunk.layer_start, chunk.token_end - chunk.token_start
            rows = np.frombuffer(chunk.payload, np.uint8)
            if chunk.wire_mode is WireMode.HIDDEN:
                rows = project(rows.reshape(tokens, STATE_BYTES))
            rows = rows.reshape(layers, tokens, TOKEN_BYTES)
            array = self.arrays.setdefault(key, np.zeros((NUM_LAYERS, 512, TOKEN_BYTES), np.uint8))
            array[chunk.layer_start : chunk.layer_end, chunk.token_start : chunk.token_end] = rows
            self.written[key] += 1
            return crc32c(chunk.payload) if is_there() else None
        finally:
            self.writing[key] -= 1
