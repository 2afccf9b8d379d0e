"""What the gateway needs of the rest: who continues prompts, and who is told how long it took."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from shoal.wire.messages import GenerateRequest, TokenOutput, TtftStages


@dataclass(frozen=True, slots=True)
class Readiness:
    """How many replicas of each pool can serve right now."""

    num_decode: int
    num_prefill: int

    @property
    def is_ready(self) -> bool:
        """Decode alone can answer: it prefills where no prefill replica does."""
        return self.num_decode > 0

    @property
    def status(self) -> str:
        if not self.is_ready:
            return "not ready: no decode"
        return "ready" if self.num_prefill else "degraded: no prefill"


class Backend(Protocol):
    """The pools behind the gateway."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        """The outputs of all choices as they come, each ended by a finish reason. ``aclose`` cancels and frees all.

        Raises the ShoalError that ended the request.
        """
        ...

    async def readiness(self) -> Readiness: ...


@dataclass(slots=True)
class Route:
    """One run of a request: decode replicas that it may not go to if there is another, and the one that it went to.

    ``replica_id`` is right once the run has ended; ``None`` if it went to none.
    """

    excluded: frozenset[str] = frozenset()
    replica_id: str | None = None

    @property
    def replicas(self) -> frozenset[str]:
        """The one that it went to, if any."""
        return frozenset() if self.replica_id is None else frozenset((self.replica_id,))


class DecodePool(Protocol):
    """The pools, of which it can be said which decode replica runs a request."""

    def generate(self, request: GenerateRequest, route: Route) -> AsyncGenerator[TokenOutput, None]:
        """As a Backend's."""
        ...

    async def living(self) -> frozenset[str]:
        """Ids of the decode replicas that serve; may be a second or two old."""
        ...

    async def readiness(self) -> Readiness: ...


class GatewayObserver(Protocol):
    """Told of each request to the generating endpoints. Times are seconds on the gateway's clock."""

    def request_started(self) -> None: ...

    def request_finished(
        self, model: str, endpoint: str, status: int, duration_s: float, error_type: str = "none"
    ) -> None:
        """Once for each ``request_started``. ``error_type`` is ``ShoalError.type``."""
        ...

    def first_token(self, ttft_s: float, gateway_s: float, stages: TtftStages) -> None:
        """Once a prompt. ``gateway_s`` is the rest of ``ttft_s``, beside decode's ``stages``."""
        ...

    def next_token(self, since_last_s: float) -> None:
        """One choice's next output."""
        ...

    def last_token(self, since_first_s: float, num_tokens: int) -> None:
        """A choice is complete with ``num_tokens``, the first included."""
        ...

    def rejected(self, reason: str) -> None:
        """Refused before anything ran. ``reason`` is ``ShoalError.code``."""
        ...

    def cancelled(self, stage: str) -> None:
        """The client went away: ``waiting`` for its first token, or ``streaming``."""
        ...

    def needed_full_depth(self, reason: str) -> None:
        """A request is encoded at full depth because of its field ``reason``."""
        ...

    def retried(self, reason: str) -> None:
        """Another decode replica runs a prompt again. ``reason`` is ``ShoalError.code`` of what ended the first run."""
        ...

    def resumed(self) -> None:
        """It has been retried after some of its answer was given out: the other replica goes on from there."""
        ...
