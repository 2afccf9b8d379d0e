"""How a start-up advances, for whoever draws it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shoal.backends.cpu.build import has_to_compile
from shoal.cluster.graph import is_private
from shoal.config import ShoalConfig


@dataclass(frozen=True, slots=True)
class Progress:
    """One thing that advances: ``ray``, ``kernels``, ``replicas``, or the weights of one replica (``decode abc123``).

    A name comes again with a larger ``num_done`` until it reaches ``num_total``.
    """

    name: str
    num_done: int
    num_total: int


OnProgress = Callable[[Progress], None]


def waits_for_compiler(config: ShoalConfig) -> bool:
    """Whether replicas of this machine compile Shoal's kernels before they load: once, some 10 to 20 seconds,
    or a minute and a half by ziglang."""
    pools = (config.prefill, config.decode)
    return (
        is_private(config)
        and config.model.dtype != "float32"  # torch computes that
        and any(pool.kernels != "torch" and pool.device != "cuda" and not pool.num_gpus for pool in pools)
        and has_to_compile()
    )
