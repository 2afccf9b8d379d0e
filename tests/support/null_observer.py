"""Who is told what becomes of requests, and looks away."""

from __future__ import annotations

from shoal.wire.messages import TtftStages


class NullObserver:
    """Looks away."""

    def request_started(self) -> None:
        pass

    def request_finished(
        self, model: str, endpoint: str, status: int, duration_s: float, error_type: str = "none"
    ) -> None:
        pass

    def first_token(self, ttft_s: float, gateway_s: float, stages: TtftStages) -> None:
        pass

    def next_token(self, since_last_s: float) -> None:
        pass

    def last_token(self, since_first_s: float, num_tokens: int) -> None:
        pass

    def rejected(self, reason: str) -> None:
        pass

    def cancelled(self, stage: str) -> None:
        pass

    def needed_full_depth(self, reason: str) -> None:
        pass

    def retried(self, reason: str) -> None:
        pass

    def resumed(self) -> None:
        pass
