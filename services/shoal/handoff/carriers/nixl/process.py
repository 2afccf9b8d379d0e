"""NIXL in one process: what a replica opens once, for all of its sessions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from shoal.backends.cpu.copying import Copier
from shoal.errors import ConfigError, ShoalError
from shoal.handoff.carriers.nixl.agent import Agent, is_installed
from shoal.handoff.carriers.nixl.loader import LINGER_S, NixlLoader
from shoal.handoff.carriers.nixl.retired import Retired
from shoal.handoff.carriers.nixl.thread import NixlThread
from shoal.handoff.carriers.nixl.unloader import NixlUnloader
from shoal.process.heartbeat import Heartbeat
from shoal.wire.handoff_messages import RemoteSegment

_log = logging.getLogger(__name__)


class Nixl:
    """No agent is made before a session needs it. ``told`` gets the bytes that are retired, as they change."""

    def __init__(self, max_retired_bytes: int, told: Callable[[int], None] = lambda num_bytes: None) -> None:
        self._thread = NixlThread()
        self._retired = Retired(max_retired_bytes, told)
        self._thread.add(self._retired)

    def warm_up(self) -> None:
        """Have NIXL's libraries loaded meanwhile, which takes the first agent of a process half a second."""
        self._thread.submit(Agent)

    async def open_loader(
        self, slot_bytes: int, max_bytes: int, copier: Copier | None = None, linger_s: float = LINGER_S
    ) -> NixlLoader:
        """Prefill's end of a session, where decode may go on reading for ``linger_s`` after it gave a lease up. Raises
        Unavailable if there is no agent, OSError without memory."""
        return await NixlLoader.open(self._thread, slot_bytes, max_bytes, copier, linger_s)

    async def attach(
        self, segment: RemoteSegment, failed: Callable[[ShoalError], None], *, deadline_s: float
    ) -> NixlUnloader | None:
        """Decode's end, or ``None``. READs that take longer than ``deadline_s`` end the session, by ``failed``."""
        return await NixlUnloader.attach(self._thread, self._retired, segment, failed, deadline_s=deadline_s)

    @property
    def heartbeat(self) -> Heartbeat:
        """The thread's, which calls NIXL."""
        return self._thread.heartbeat

    @property
    def num_readers(self) -> int:
        """Of sessions that are open, or left a READ behind."""
        return self._retired.num_readers

    async def close(self) -> None:
        """The sessions have ended. Twice is a no-op."""
        await asyncio.to_thread(self._thread.close)
        self._retired.abandon()


def nixl_for(
    carrier: str,
    max_retired_bytes: int = 0,
    told: Callable[[int], None] = lambda num_bytes: None,
    *,
    is_encrypted: bool = False,
) -> Nixl | None:
    """NIXL, if ``handoff.carrier`` allows it and it's installed. Raises ConfigError if it asks for what isn't there.

    Where the hand-off ``is_encrypted``, it has to be asked for by name: UCX neither encrypts nor asks who is there.
    """
    if carrier not in {"auto", "nixl"}:
        return None
    if carrier == "auto" and is_encrypted:
        if is_installed():
            _log.info("NIXL isn't used, since tls doesn't cover it: handoff.carrier: nixl would, in plain text")
        return None
    if carrier == "nixl" and is_encrypted:
        _log.warning(
            "tls doesn't cover NIXL: K/V are in plain text, and whoever reaches UCX's ports can read and write this "
            "process' memory (handoff.carrier: auto does without)"
        )
    if is_installed():
        nixl = Nixl(max_retired_bytes, told)
        if carrier == "nixl":  # with auto, no session may ever need it
            nixl.warm_up()
        return nixl
    if carrier == "nixl":
        raise ConfigError("handoff.carrier is nixl, but NIXL isn't installed: pip install 'shoal[nixl]', or say auto")
    return None
