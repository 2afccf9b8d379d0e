"""What both ends of a session share: one reader, one writer, the greeting, beats, and the end.

::

    greet ─> Hello both ways, or twice: version, plans and wire modes are compared before anything else is looked at
    read  ─> each frame to ``_obey``, which never waits: the reader must see a Cancel behind any number of chunks
    write ─> frames in the order in which they were posted; whoever sends much posts one, and waits until it's written
    end   ─> either side closes, or is silent for ``ttl_s``; ``_ended`` is called once, whatever the reason
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from shoal.errors import InternalError, PeerGone, PlanMismatch, ProtocolViolation, ShoalError
from shoal.handoff.base import Channel, Clock, Timer
from shoal.model.plan import short_name, what_differs
from shoal.wire.handoff_messages import Beat, Envelope, Frame, Hello, WireMode

PROTOCOL_VERSION = 4
_BEATS_PER_TTL = 3
MAX_UNSENT_FRAMES = 1 << 16
"""More than an honest peer brings about and leaves unread: a seal asks again for what may be under way, no more."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Identity:
    """What this process says of itself in Hello. ``peer`` is a name for logs, ``key`` what the directory says of it."""

    incarnation: int
    plan_hashes: tuple[str, ...]
    wire_modes: tuple[WireMode, ...] = (WireMode.KV,)
    peer: str = ""
    key: bytes = b""

    @property
    def hello(self) -> Hello:
        return Hello(PROTOCOL_VERSION, self.plan_hashes, self.wire_modes, self.peer, key=self.key)


class Session:
    """One end. A subclass says what it does with a frame (``_obey``) and when all is over (``_ended``)."""

    def __init__(self, channel: Channel, identity: Identity, *, ttl_s: float, clock: Clock) -> None:
        self.peer: Hello | None = None
        self._heard: list[Hello] = []
        self.error: ShoalError | None = None
        self.num_dropped = 0
        self.peer_is_draining = False
        self._channel = channel
        self._identity = identity
        self._ttl_s = ttl_s
        self._clock = clock
        self._peer_incarnation: int | None = None
        self._outbox: asyncio.Queue[tuple[Frame, Callable[[], None] | None]] = asyncio.Queue()
        self._last_heard_s = clock.time()
        self._timers: dict[str, Timer] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._writer: asyncio.Task[None] | None = None

    @property
    def is_over(self) -> bool:
        return self.error is not None

    @property
    def peer_incarnation(self) -> int:
        """Which process start is at the other end. Raises PeerGone before it has said so."""
        if self._peer_incarnation is None:
            raise PeerGone("the other end hasn't greeted yet")
        return self._peer_incarnation

    def post(self, frame: Frame, written: Callable[[], None] | None = None) -> None:
        """Send ``frame`` after all that was posted before, and call ``written`` then. A no-op once all is over, as when
        the other end asks and never reads."""
        if self._outbox.qsize() >= MAX_UNSENT_FRAMES:
            self._end(ProtocolViolation(f"{MAX_UNSENT_FRAMES} answers wait for the other end to read them"))
        if not self.is_over:
            self._outbox.put_nowait((frame, written))

    async def run(self) -> None:
        """Greet, then obey until the session ends. Raises what ended it, if that was the other side's fault."""
        try:
            await self.greet()
            await self.obey()
        finally:
            await self.close()

    async def greet(self) -> None:
        """Compare Hellos. Raises PlanMismatch naming what differs, or PeerGone; the session is over then."""
        self._watch()
        try:
            self.peer = await self._exchange(self._identity.hello)
            if self.error is not None:  # nothing was heard for too long, while ours was written
                raise self.error
        except ShoalError as error:
            self._end(error)
            raise self.error or error from error
        self._writer = self._spawn(self._write())
        self._beat()

    async def obey(self) -> None:
        """Read until the session ends; raises why, unless the other side just went away."""
        try:
            while True:
                frame = await self._receive()
                if frame not in self._heard:  # Hello once more: a frame may arrive twice
                    self._obey(frame)
        except ShoalError as error:
            self._end(error)
        if self.error is not None and not isinstance(self.error, PeerGone):
            raise self.error

    async def close(self) -> None:
        """End the session for both sides. Twice is a no-op."""
        self._end(PeerGone("the session was closed"))
        await self._channel.close()
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- for the subclass -----------------------------------------------------------------------------

    async def _exchange(self, ours: Hello) -> Hello:
        """Say Hello and return theirs, once it's compared. A peer that we refuse must see ours, to know why."""
        raise NotImplementedError

    async def _say(self, hello: Hello) -> None:
        await self._channel.send(Envelope(self._identity.incarnation, hello))

    async def _listen(self) -> Hello:
        """Their next Hello. Raises ProtocolViolation, or PlanMismatch unless the two ends can work together."""
        theirs = await self._receive()
        while theirs in self._heard:
            theirs = await self._receive()
        if not isinstance(theirs, Hello):
            raise ProtocolViolation(f"the other end said {type(theirs).__name__} where Hello belongs")
        self._heard.append(theirs)
        _compare(self._identity.hello, theirs)
        return theirs

    def _obey(self, frame: Frame) -> None:
        """Act on ``frame`` without waiting. A ShoalError ends the session."""
        raise NotImplementedError

    def _ended(self, error: ShoalError) -> None:
        """The session is over; nothing can be posted any more."""
        raise NotImplementedError

    def _worked_on(self) -> tuple[bytes, ...]:
        """The leases that a beat of this end renews."""
        return ()

    # --- inside ---------------------------------------------------------------------------------------

    async def _receive(self) -> Frame:
        """The next frame of the process that greeted; those of another incarnation are dropped."""
        while True:
            envelope = await self._channel.receive()
            if self.error is not None:
                raise self.error
            if self._peer_incarnation is None:
                self._peer_incarnation = envelope.incarnation
            if envelope.incarnation == self._peer_incarnation:
                self._last_heard_s = self._clock.time()
                return envelope.frame
            self.num_dropped += 1

    async def _write(self) -> None:
        while True:
            frame, written = await self._outbox.get()
            await self._channel.send(Envelope(self._identity.incarnation, frame))
            if written is not None:
                written()

    def _beat(self) -> None:
        self.post(Beat(self._worked_on()))
        self._call_at("beat", self._clock.time() + self._ttl_s / _BEATS_PER_TTL, self._beat)

    def _watch(self) -> None:
        """End the session if nothing was heard for ``ttl_s``; else look again when that could be so."""
        silent_at = self._last_heard_s + self._ttl_s
        if self._clock.time() >= silent_at:
            self._end(PeerGone(f"nothing was heard from the other end for {self._ttl_s:g} s"))
        else:
            self._call_at("watch", silent_at, self._watch)

    def _call_at(self, name: str, when: float, callback: Callable[[], None]) -> None:
        if not self.is_over:  # by what was just posted
            self._timers[name] = self._clock.call_at(when, callback)

    def _end(self, error: ShoalError) -> None:
        if self.error is not None:
            return
        self.error = error
        for timer in self._timers.values():
            timer.cancel()
        if self._writer is not None:
            self._writer.cancel()
        self._ended(error)
        self._spawn(self._channel.close())

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, ShoalError):
            self._end(error)
        elif error is not None:
            _log.error("a session's task failed", exc_info=error)
            self._end(InternalError("a session's task failed; the log says more"))


def _compare(ours: Hello, theirs: Hello) -> None:
    """Raise PlanMismatch unless the two ends can work together. The version first: it gives the rest its meaning."""
    if ours.protocol_version != theirs.protocol_version:
        raise PlanMismatch(
            f"hand-off protocol {ours.protocol_version} here, {theirs.protocol_version} at {theirs.peer or 'the peer'}:"
            " run one release of Shoal on both pools"
        )
    if not set(ours.plan_hashes) & set(theirs.plan_hashes):
        raise PlanMismatch(
            f"no plan in common: {_names(ours)} here, {_names(theirs)} at {theirs.peer or 'the peer'}: "
            + what_differs(ours.plan_hashes, theirs.plan_hashes)
        )
    if not set(ours.wire_modes) & set(theirs.wire_modes):
        raise PlanMismatch(f"no wire mode in common: {ours.wire_modes} here, {theirs.wire_modes} at the peer")


def _names(hello: Hello) -> str:
    return ", ".join(map(short_name, hello.plan_hashes)) or "none"
