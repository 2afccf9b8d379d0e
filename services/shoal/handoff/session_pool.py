"""Prefill's sessions: one to each decode replica, opened at the start or when first needed, and again after it died."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from functools import partial

import structlog

from shoal.errors import ShoalError, Unavailable
from shoal.handoff.base import Channel, Clock
from shoal.handoff.offer import Staging
from shoal.handoff.prefill_side import PrefillSession
from shoal.handoff.session import Identity
from shoal.wire.handoff_messages import Grant, Granted

_log = structlog.get_logger(__name__)


class SessionPool:
    """``connect`` gives a channel to an address: ``channels.grpc.dial``, or a memory channel.

    ``staging`` makes memory for each session's payload (without it, it travels inline); ``opened`` is told of each.
    """

    def __init__(
        self,
        connect: Callable[[str], Awaitable[Channel]],
        identity: Identity,
        *,
        ttl_s: float,
        max_frame_bytes: int,
        clock: Clock | None = None,
        staging: Staging | None = None,
        opened: Callable[[str, PrefillSession], None] = lambda address, session: None,
    ) -> None:
        self._connect = connect
        self._identity = identity
        self._ttl_s = ttl_s
        self._max_frame_bytes = max_frame_bytes
        self._clock = clock
        self._staging = staging
        self._told_opened = opened
        self.granted: Callable[[Grant], None] = lambda grant: None
        """Told of prompts that decode replicas ask for by their sessions."""
        self._opened: dict[str, asyncio.Task[PrefillSession]] = {}
        self._is_draining = False

    async def get(self, address: str) -> PrefillSession:
        """The session to ``address``. Raises PlanMismatch, PeerGone, or Unavailable while draining."""
        if self._is_draining:
            raise Unavailable("this prefill replica is shutting down: no new claims")
        opened = self._opened.get(address)
        if opened is None or _is_over(opened):
            self._opened = {known: task for known, task in self._opened.items() if not _is_over(task)}
            opened = asyncio.get_running_loop().create_task(self._open(address))
            opened.add_done_callback(partial(_tell_defect, address))
            self._opened[address] = opened
        # Several may wait for it: the first one's leaving mustn't end it.
        return await asyncio.shield(opened)

    async def greet(self, addresses: Iterable[str], within_s: float) -> dict[str, ShoalError]:
        """Open sessions before a prompt needs them: to greet takes a second or more where memory has to be made known.

        Returns who refused, or isn't there, and why; they are greeted again when a prompt goes there, and so is who
        hasn't answered after ``within_s``.
        """
        opening = {address: asyncio.ensure_future(self.get(address)) for address in addresses}
        if opening:
            await asyncio.wait(opening.values(), timeout=within_s)
        for one in opening.values():
            one.cancel()  # who isn't there yet may still come
        ends = await asyncio.gather(*opening.values(), return_exceptions=True)
        return {address: end for address, end in zip(opening, ends, strict=True) if isinstance(end, ShoalError)}

    async def drain(self, drain_s: float) -> None:
        """Allow no new claims, let the open ones finish for ``drain_s``, then stop them, and close."""
        self._is_draining = True
        sessions = self._living()
        try:
            async with asyncio.timeout(drain_s):
                await asyncio.gather(*(session.drain() for session in sessions))
        except TimeoutError:
            await asyncio.gather(*(session.cancel_claims("prefill is shutting down") for session in sessions))
        await self.close()

    async def close(self) -> None:
        """End all sessions at once; their claims are told. Twice is a no-op."""
        self._is_draining = True
        for task in self._opened.values():
            task.cancel()
        await asyncio.gather(*self._opened.values(), return_exceptions=True)
        await asyncio.gather(*(session.close() for session in self._living()))

    def _living(self) -> tuple[PrefillSession, ...]:
        return tuple(task.result() for task in self._opened.values() if not _is_over(task) and task.done())

    def _hear(self, address: str, granted: Granted) -> None:
        if not self._is_draining:
            self.granted(granted.at(address))

    async def _open(self, address: str) -> PrefillSession:
        channel = await self._connect(address)
        session = await PrefillSession.open(
            channel,
            self._identity,
            ttl_s=self._ttl_s,
            max_frame_bytes=self._max_frame_bytes,
            clock=self._clock,
            staging=self._staging,
            granted=partial(self._hear, address),
        )
        self._told_opened(address, session)
        return session


def _tell_defect(address: str, opened: asyncio.Task[PrefillSession]) -> None:
    """Whoever waits for it may have left before it fails."""
    error = None if opened.cancelled() else opened.exception()
    if error is not None and not isinstance(error, ShoalError):
        _log.error("a session wasn't opened, by a defect", address=address, exc_info=error)


def _is_over(opened: asyncio.Task[PrefillSession]) -> bool:
    """It failed to open, or has ended since."""
    if not opened.done():
        return False
    return opened.cancelled() or opened.exception() is not None or opened.result().is_over
