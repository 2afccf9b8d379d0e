"""Faults for a channel: rules that lose, double, delay, reorder, truncate or corrupt what goes through it.

Each strikes where ``when`` says so, at most ``times`` times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from shoal.wire.handoff_messages import Chunk, Envelope, Frame

When = Callable[[Frame], bool]


class Fault:
    """A rule (channels/memory.py) that strikes some envelopes and lets all others pass."""

    def __init__(self, when: When | type[Frame], *, times: int = 1) -> None:
        self._when = when
        self.num_left = times

    def __call__(self, envelope: Envelope) -> Iterable[Envelope]:
        if self.num_left > 0 and self._is_meant(envelope.frame):
            self.num_left -= 1
            return self.strike(envelope)
        return self.spare(envelope)

    def strike(self, envelope: Envelope) -> Iterable[Envelope]:
        raise NotImplementedError

    def spare(self, envelope: Envelope) -> Iterable[Envelope]:
        return (envelope,)

    def _is_meant(self, frame: Frame) -> bool:
        return isinstance(frame, self._when) if isinstance(self._when, type) else self._when(frame)


class Drop(Fault):
    """Loses it."""

    def strike(self, envelope: Envelope) -> Iterable[Envelope]:
        return ()


class Duplicate(Fault):
    """Delivers it twice."""

    def strike(self, envelope: Envelope) -> Iterable[Envelope]:
        return (envelope, envelope)


class Corrupt(Fault):
    """Flips one bit of its payload, or of the checksum of one that is staged. Only chunks have one; others pass."""

    def strike(self, envelope: Envelope) -> Iterable[Envelope]:
        return (flip_bit(envelope, 0),)


class Truncate(Fault):
    """Loses the second half of its payload, staged or not. Only chunks have one; others pass."""

    def strike(self, envelope: Envelope) -> Iterable[Envelope]:
        return (truncate(envelope),)


class Delay(Fault):
    """Holds it until ``num_frames`` others have passed. With one, neighbours change places."""

    def __init__(self, when: When | type[Frame], *, times: int = 1, num_frames: int = 1) -> None:
        super().__init__(when, times=times)
        self._num_frames = num_frames
        self._held: list[tuple[int, Envelope]] = []

    def strike(self, envelope: Envelope) -> Iterable[Envelope]:
        self._held.append((self._num_frames, envelope))
        return ()

    def spare(self, envelope: Envelope) -> Iterable[Envelope]:
        waiting = [(left - 1, held) for left, held in self._held]
        self._held = [(left, held) for left, held in waiting if left > 0]
        return (envelope, *(held for left, held in waiting if left <= 0))


def flip_bit(envelope: Envelope, bit: int) -> Envelope:
    """``envelope`` with bit ``bit`` (modulo its length) of its payload flipped; itself if it has none.

    The payload of a staged chunk isn't here: then it's a bit of the checksum.
    """
    frame = envelope.frame
    if not isinstance(frame, Chunk):
        return envelope
    if frame.staged is not None:
        return replace(envelope, frame=replace(frame, crc32c=frame.crc32c ^ 1 << bit % 32))
    payload = bytearray(frame.payload)
    payload[bit // 8 % len(payload)] ^= 1 << bit % 8
    return replace(envelope, frame=replace(frame, payload=bytes(payload)))


def truncate(envelope: Envelope) -> Envelope:
    """``envelope`` with the first half of its payload alone; itself if it has none."""
    frame = envelope.frame
    if not isinstance(frame, Chunk):
        return envelope
    if frame.staged is not None:
        staged = replace(frame.staged, num_bytes=frame.staged.num_bytes // 2)
        return replace(envelope, frame=replace(frame, staged=staged))
    return replace(envelope, frame=replace(frame, payload=frame.payload[: len(frame.payload) // 2]))
