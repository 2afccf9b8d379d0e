"""The prefill pool as a decode replica sees it."""

from __future__ import annotations

from typing import Protocol

from shoal.wire.handoff_messages import Grant, HandoffOutcome


class PrefillPool(Protocol):
    """Replicas have ids. Belongs to the event loop."""

    async def living(self, *, now: bool = False) -> frozenset[str]:
        """Ids of the replicas that serve; may be a second or two old, unless ``now`` is asked for."""
        ...

    @property
    def unfit(self) -> frozenset[str]:
        """Ids of those that are there and get no work, say because they hang; as old as what ``living`` said last."""
        ...

    async def ask(self, grant: Grant) -> HandoffOutcome:
        """Hand ``grant`` to a replica that it doesn't exclude; returns when its lease has ended.

        Raises the ShoalError that the replica raised, PeerGone if it died. Cancelling it cancels the replica's work.
        """
        ...

    def asked(self, grant: Grant) -> str | None:
        """The replica that ``grant`` went to; ``None`` if it went to none, or nobody knows."""
        ...
