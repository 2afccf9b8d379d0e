"""A prefill process that keeps no rules, frame by frame."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TypeVar

from kv_prompts import NUM_LAYERS, PLAN, TOKEN_BYTES, piece_of

from shoal.errors import HandoffError, PeerGone, ShoalError
from shoal.handoff.base import Channel, crc32c
from shoal.handoff.carriers.nixl.loader import NixlLoader
from shoal.handoff.carriers.shm import ShmLoader
from shoal.handoff.session import PROTOCOL_VERSION
from shoal.wire.handoff_messages import Chunk, Envelope, Frame, Hello, WireMode

F = TypeVar("F", bound=Frame)


class RawPeer:
    """A prefill process that sends whatever a test wants. ``frames`` is what decode answered, without beats."""

    def __init__(self, channel: Channel, incarnation: int = 77) -> None:
        self.channel = channel
        self.incarnation = incarnation

    async def greet(self, *, version: int = PROTOCOL_VERSION, plans: tuple[str, ...] = (PLAN,)) -> Hello:
        await self.send(Hello(version, plans, tuple(WireMode), peer="raw"))
        answer = await self.receive()
        assert isinstance(answer, Hello)
        return answer

    async def send(self, *frames: Frame, incarnation: int | None = None) -> None:
        for frame in frames:
            await self.channel.send(Envelope(self.incarnation if incarnation is None else incarnation, frame))

    async def receive(self) -> Frame:
        """The next frame that isn't a beat."""
        while True:
            frame = (await asyncio.wait_for(self.channel.receive(), 10)).frame
            if type(frame).__name__ != "Beat":
                return frame

    async def expect(self, kind: type[F]) -> F:
        frame = await self.receive()
        assert isinstance(frame, kind), frame
        return frame

    async def until_gone(self) -> ShoalError:
        """Read until decode ends the channel; returns why."""
        while True:
            try:
                await self.receive()
            except (PeerGone, HandoffError) as error:
                return error


def chunk(
    new_id: bytes, seq: int, tokens: tuple[int, int], layers: tuple[int, int] = (0, NUM_LAYERS), **changes: object
) -> Chunk:
    """A well-formed chunk of zeros, or with ``changes``."""
    payload = bytes(TOKEN_BYTES * (tokens[1] - tokens[0]) * (layers[1] - layers[0]))
    fields = {"crc32c": crc32c(payload), "payload": payload} | changes
    return Chunk(new_id, seq, *tokens, *layers, **fields)  # type: ignore[arg-type]


def staged(
    loader: ShmLoader | NixlLoader, new_id: bytes, seq: int = 0, tokens: tuple[int, int] = (0, 8), **place: int
) -> Chunk:
    """A good staged chunk, or one that says it's at another ``place``."""
    loaded = loader.load(piece_of(chunk(new_id, seq, tokens)))
    assert loaded.staged is not None
    return replace(loaded, staged=replace(loaded.staged, **place))
