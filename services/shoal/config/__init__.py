"""Configuration: one frozen class a layer, unknown keys refused, checked once before anything starts.

A file is YAML in the shape of ``ShoalConfig``; every key can also come from the environment
(``SHOAL_DECODE__REPLICAS=2``). The command line wins over the environment, the environment over the file.
"""

from shoal.config.loading import load_config
from shoal.config.pools import PREFILL_NICENESS, HandoffConfig, StageConfig
from shoal.config.sections import (
    AUTO,
    Dtype,
    GatewayConfig,
    LogConfig,
    MetricsConfig,
    ModelConfig,
    PeerTlsConfig,
    RateConfig,
    RayConfig,
    RetryConfig,
    TlsConfig,
)
from shoal.config.whole import ShoalConfig

__all__ = [
    "AUTO",
    "PREFILL_NICENESS",
    "Dtype",
    "GatewayConfig",
    "HandoffConfig",
    "LogConfig",
    "MetricsConfig",
    "ModelConfig",
    "PeerTlsConfig",
    "RateConfig",
    "RayConfig",
    "RetryConfig",
    "ShoalConfig",
    "StageConfig",
    "TlsConfig",
    "load_config",
]
