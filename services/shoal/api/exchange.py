"""One request as the observer sees it, through whatever door it came and however it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import structlog

from shoal.api.backend import GatewayObserver
from shoal.api.generation import Generation
from shoal.errors import Cancelled, DeadlineExceeded, InternalError, ShoalError

_log = structlog.get_logger(__name__)


class Exchange:
    """Open for as long as a request is being answered; ``exits`` are left then.

    ``tenant``, ``model`` and ``generation`` are set once they're known.
    """

    def __init__(self, endpoint: str, observer: GatewayObserver, clock: Callable[[], float]) -> None:
        self.arrived_s = clock()
        self.tenant = ""
        self.model = ""
        self.generation: Generation | None = None
        self.exits = ExitStack()
        self._endpoint = endpoint
        self._observer = observer
        self._clock = clock
        self._error: ShoalError | None = None

    def __enter__(self) -> Self:
        self._observer.request_started()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._error is not None:
            pass  # what ends it now is only how
        elif isinstance(error, asyncio.CancelledError | GeneratorExit):
            self._error = Cancelled("the server stopped this request")
        elif error is not None:
            self._error = error if isinstance(error, ShoalError) else InternalError("")
        self.exits.close()
        self._tell()

    def ran(self) -> bool:
        """It wasn't sent away, here or by decode."""
        return self.generation is not None and not self._was_rejected()

    def failed(self, error: ShoalError) -> None:
        """``error`` is why it ends, though not with that exception: its stream tells it, or nobody listens any more."""
        self._error = error

    def _has_output(self) -> bool:
        return self.generation is not None and bool(self.generation.timings)

    def _was_rejected(self) -> bool:
        is_refusal = not isinstance(self._error, None | Cancelled | InternalError | DeadlineExceeded)
        return is_refusal and not self._has_output()

    def _tell(self) -> None:
        error = self._error
        if isinstance(error, Cancelled):
            self._observer.cancelled("streaming" if self._has_output() else "waiting")
        elif error is not None and self._was_rejected():
            self._observer.rejected(error.code)
        status, error_type = (200, "none") if error is None else (error.http_status, error.type)
        duration_s = self._clock() - self.arrived_s
        self._observer.request_finished(self.model, self._endpoint, status, duration_s, error_type)
        _log.info(
            "request answered", endpoint=self._endpoint, status=status, duration_s=round(duration_s, 4), **self._facts()
        )

    def _facts(self) -> dict[str, Any]:
        """For the log: sizes and times, and nothing that a client wrote."""
        code = {} if self._error is None else {"code": self._error.code}
        if self.generation is None:
            return {**code, "tenant": self.tenant} if self.tenant else code
        ttft_s = min((timing.ttft_s for timing in self.generation.timings.values()), default=None)
        return {
            **code,
            "tenant": self.tenant,
            "model": self.model,
            "depth": str(self.generation.depth),
            "num_prompt_tokens": self.generation.num_prompt_tokens,
            "num_output_tokens": self.generation.num_completion_tokens,
            "ttft_s": None if ttft_s is None else round(ttft_s, 4),
        }
