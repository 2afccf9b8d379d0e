"""What became of one request, as the client saw it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from shoal_lab.bench.mix import Slo


class Failure(enum.StrEnum):
    """Why a request has no whole answer. Each counts as a missed SLO."""

    UNREACHABLE = "unreachable"
    """No connection: refused, unknown host, no route, TLS, too many open files."""
    DISCONNECTED = "disconnected"
    """The connection was lost before an answer began."""
    REJECTED = "rejected"
    """HTTP 429 or 503: the endpoint has too much to do."""
    HTTP_ERROR = "http_error"
    """Any other status but 200."""
    ERROR_EVENT = "error_event"
    """The stream had an event that says what went wrong."""
    BROKEN_STREAM = "broken_stream"
    """The stream ended without [DONE]."""
    MALFORMED = "malformed"
    """The answer isn't a stream of OpenAI's events."""
    NO_TOKENS = "no_tokens"
    """The stream ended well, and had no token."""
    TIMEOUT = "timeout"
    """Not done within the time that a request has."""


class TokenSource(enum.StrEnum):
    """Who counted output tokens: the endpoint, or we did, one for each chunk that carries any."""

    USAGE = "usage"
    CHUNKS = "chunks"


@dataclass(frozen=True, slots=True)
class Record:
    """Times in seconds; ``arrival_s`` (when it was due, open loop only) and ``sent_s`` count from the load's start.

    TTFT and E2E last from sending until the first and the last chunk with tokens came; ``itl_s`` are the gaps between
    these chunks. ``e2e_s`` is ``None`` where there is a ``failure``; what came before it stays. ``prompt_tokens`` is as
    the endpoint counted, or ``None``, and so is ``cached_tokens``, those of them that it had computed before;
    ``planned_tokens`` and ``max_tokens`` were asked for. ``status`` is HTTP's.
    """

    index: int
    kind: str
    is_counted: bool
    planned_tokens: int
    max_tokens: int
    arrival_s: float | None
    sent_s: float
    ttft_s: float | None = None
    e2e_s: float | None = None
    itl_s: tuple[float, ...] = ()
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int = 0
    tokens_from: TokenSource = TokenSource.CHUNKS
    failure: Failure | None = None
    status: int | None = None
    detail: str = ""

    @property
    def tpot_s(self) -> float | None:
        """``(E2E - TTFT) / (output tokens - 1)``; ``None`` for one token or a failure."""
        if self.e2e_s is None or self.ttft_s is None or self.output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)

    @property
    def lateness_s(self) -> float | None:
        """How long after it was due it was sent: the generator's fault, never the endpoint's."""
        return None if self.arrival_s is None else self.sent_s - self.arrival_s

    def meets_ttft(self, slo: Slo) -> bool:
        return self.failure is None and self.ttft_s is not None and 1e3 * self.ttft_s <= slo.ttft_ms

    def meets_tpot(self, slo: Slo) -> bool:
        """An answer of one token has no second one to be late."""
        return self.failure is None and (self.tpot_s is None or 1e3 * self.tpot_s <= slo.tpot_ms)
