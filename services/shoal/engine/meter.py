"""What every step tells the metrics, the same for both stages."""

from __future__ import annotations

from shoal.engine.events import StepOutput
from shoal.telemetry import StageMetrics


class StepMeter:
    """Give it each ``StepOutput``."""

    def __init__(self, metrics: StageMetrics) -> None:
        self._metrics = metrics
        self._num_preemptions = 0

    def __call__(self, output: StepOutput) -> None:
        counts = output.counts
        self._metrics.queue_depth(counts.num_waiting)
        used = counts.num_blocks - counts.num_free_blocks - counts.num_reserved_blocks
        num_deep_held = counts.num_deep_blocks - counts.num_free_deep_blocks
        deep_usage = num_deep_held / counts.num_deep_blocks if counts.num_deep_blocks else 0.0
        self._metrics.blocks(
            free=counts.num_free_blocks, used=used, reserved=counts.num_reserved_blocks, deep_usage=deep_usage
        )
        if counts.num_preemptions > self._num_preemptions:
            self._metrics.preempted(counts.num_preemptions - self._num_preemptions)
            self._num_preemptions = counts.num_preemptions
