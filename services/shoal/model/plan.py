"""Which layers a token runs, and where each layer's K/V of it comes from.

::

                    layer 0 ........ K-1 | K ......... L-1
    tokens 0..N-2   own    own    own    | projected from the state that left layer K-1      (shallow)
    token  N-1      own    own    own    | own                            boundary token     (full)
    tokens N..      own    own    own    | own                            generated          (full)

A token's depth belongs to the token for ever: a recompute after preemption runs prompt tokens shallow again and
generated tokens full again (POP, arXiv 2602.03295, section 3). Plain Python: no device needed to decide.
"""

from __future__ import annotations

import enum
import hashlib
import json
from dataclasses import dataclass

from shoal.errors import ConfigError
from shoal.messages import Depth, Stage


class KvSource(enum.StrEnum):
    """Where a pool's K/V of one token in one layer comes from."""

    OWN = "own"
    PROJECTED = "projected"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """``num_layers`` (L) layers of which a shallow token skips the last ``num_skipped`` (S)."""

    num_layers: int
    num_skipped: int

    def __post_init__(self) -> None:
        if not 0 <= self.num_skipped < self.num_layers:
            raise ConfigError(
                f"skip_layers is {self.num_skipped}, but this model has {self.num_layers} layers: "
                f"choose 0 to {self.num_layers - 1}"
            )

    @classmethod
    def default(cls, num_layers: int, num_skipped: int | None = None) -> LayerPlan:
        """A third of the layers is skipped unless told otherwise (the paper's choice)."""
        return cls(num_layers, num_layers // 3 if num_skipped is None else num_skipped)

    @property
    def num_kept(self) -> int:
        """K: the layers that every token runs."""
        return self.num_layers - self.num_skipped

    @property
    def kept(self) -> range:
        return range(self.num_kept)

    @property
    def skipped(self) -> range:
        return range(self.num_kept, self.num_layers)

    def layers_run(self, depth: Depth) -> range:
        return self.kept if depth is Depth.SHALLOW else range(self.num_layers)

    def num_shallow_tokens(self, num_prompt_tokens: int, depth: Depth) -> int:
        """How many leading tokens of a request are shallow: all of its prompt but the boundary token, or none."""
        return num_prompt_tokens - 1 if depth is Depth.SHALLOW and self.num_skipped else 0

    def kv_source(self, stage: Stage, layer: int, depth: Depth) -> KvSource:
        """Where ``stage``'s pool has a token's K/V in ``layer`` from.

        Prefill's pool has no deep layers: their K/V are projected into the send buffer and never stored.
        """
        if layer < self.num_kept:
            return KvSource.OWN
        if stage is Stage.PREFILL:
            return KvSource.ABSENT
        return KvSource.PROJECTED if depth is Depth.SHALLOW else KvSource.OWN

    def layers_held(self, stage: Stage) -> range:
        """The layers whose whole weights (and K/V) a stage holds."""
        return self.kept if stage is Stage.PREFILL else range(self.num_layers)

    def digest(self, *, model_digest: str, kv_dtype: str, projector: str = "paper") -> str:
        """Plan hash: two replicas may exchange K/V only if it's equal.

        ``projector`` is the digest of a calibrated one. Weight dtype, kernels and block size don't count: an int8
        decode may pair with a bfloat16 prefill.
        """
        facts = {
            "format": 1,
            "model": model_digest,
            "layers": self.num_layers,
            "kept": self.num_kept,
            "tokens": "prompt shallow, boundary full",
            "visibility": "all",
            "projector": projector,
            "kv_dtype": kv_dtype,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
