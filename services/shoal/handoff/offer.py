"""What prefill offers at Hello for payload to travel by, and what decode takes of it.

::

    memory on this host  ── decode finds it ──────────────────────────────> shm
            │ no room, or another host
            v
    memory for NIXL  ── both have it, and decode reads the nonce ─────────> nixl
            │
            └──────────────────────────────────────────────────────────────> inline, in the frames

The second is made and offered, by another Hello, only if the first is no use.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from shoal.backends.cpu.copying import Copier
from shoal.errors import Unavailable
from shoal.handoff.base import StagingLoader
from shoal.wire.handoff_messages import Carrier, CarrierReason, Hello

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Staging:
    """How prefill makes memory that decode may read payload from, on its host and anywhere; ``None``: it doesn't.

    Raise OSError if there is no room, Unavailable if it can't be had for another reason. What goes inline ``copier``
    puts together.
    """

    local: Callable[[], StagingLoader] | None = None
    remote: Callable[[], Awaitable[StagingLoader]] | None = None
    copier: Copier = field(default_factory=Copier, compare=False)


class Offer:
    """One greeting. ``taken`` is what decode took, ``reason`` why that or nothing."""

    def __init__(self, staging: Staging, ask: Callable[[Hello], Awaitable[Hello]]) -> None:
        self.taken: StagingLoader | None = None
        self.reason = CarrierReason.CONFIGURED
        self._staging = staging
        self._ask = ask

    async def make(self, ours: Hello) -> Hello:
        """Returns decode's last Hello, the answer to ``ours``. Raises as ``ask`` does, with nothing taken."""
        ours = replace(ours, has_nixl=self._staging.remote is not None)
        local = self._make_local()
        theirs = await self._offer(ours, local or await self._make_remote())
        if local is not None and self.taken is None:
            self.reason = CarrierReason.OTHER_HOST
            if ours.has_nixl and theirs.has_nixl:
                theirs = await self._offer(replace(ours, has_nixl=False), await self._make_remote())
        return theirs

    async def _offer(self, ours: Hello, staging: StagingLoader | None) -> Hello:
        if staging is None:
            return await self._ask(ours)
        try:
            theirs = await self._ask(ours.naming(staging.segment))
            if theirs.names(staging.segment):
                self.taken = staging
            if staging.carrier is Carrier.SHM and self.taken is staging:
                self.reason = CarrierReason.SAME_HOST
            elif staging.carrier is Carrier.NIXL and self.taken is None:
                self.reason = CarrierReason.NO_NIXL
        finally:
            # Whoever was to find it has, or never will.
            staging.hide() if self.taken is staging else staging.close()
        return theirs

    def _make_local(self) -> StagingLoader | None:
        try:
            return None if self._staging.local is None else self._staging.local()
        except OSError as error:
            _log.warning("no memory to stage payload in: %s", error)
            self.reason = CarrierReason.NO_ROOM
            return None

    async def _make_remote(self) -> StagingLoader | None:
        try:
            return None if self._staging.remote is None else await self._staging.remote()
        except (OSError, Unavailable) as error:
            _log.warning("no memory that NIXL could read payload from: %s", error)
            self.reason = CarrierReason.NO_NIXL
            return None
