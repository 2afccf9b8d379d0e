from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from shoal.engine.events import EngineCounts, StepOutput
from shoal.engine.meter import StepMeter
from shoal.telemetry import DecodeMetrics


@pytest.mark.parametrize(
    ("num_free", "num_reserved", "num_deep", "num_free_deep", "usage"),
    [(64, 0, 0, 0, 0.0), (48, 8, 0, 0, 0.25), (48, 8, 16, 2, 0.875), (8, 8, 16, 12, 0.875)],
)
def test_the_pool_is_as_full_as_its_fuller_kind_of_blocks(
    num_free: int, num_reserved: int, num_deep: int, num_free_deep: int, usage: float
):
    registry = CollectorRegistry()
    counts = EngineCounts(0, 0, 1, 64, num_free, num_reserved, 0, num_deep, num_free_deep)
    StepMeter(DecodeMetrics(registry))(StepOutput(0.0, 1.0, counts))
    assert registry.get_sample_value("shoal_kv_cache_usage_ratio") == usage
    assert registry.get_sample_value("shoal_kv_blocks", {"state": "used"}) == 64 - num_free - num_reserved
