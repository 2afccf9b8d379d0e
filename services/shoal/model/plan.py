"""Which layers a token runs, and where each layer's K/V of it comes from.

POP (arXiv 2602.03295, section 3), with one boundary token::

                    layer 0 ........ K-1 | K ......... L-1
    tokens 0..N-2   own    own    own    | projected from the state that left layer K-1      (shallow)
    token  N-1      own    own    own    | own                            boundary token     (full)
    tokens N..      own    own    own    | own                            generated          (full)

SPEED (arXiv 2605.06105), with A anchors and an answer's header that begins at F::

    tokens 0..A-1   own    own    own    | own                            anchors            (full)
    tokens A..F-1   own    own    own    | absent: nothing later sees them there             (shallow)
    tokens F..      own    own    own    | own                            header, generated  (full)

A token's depth belongs to the token for ever: a recompute after preemption runs prompt tokens shallow again and
generated tokens full again. Plain Python: no device needed to decide.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from shoal.errors import ConfigError
from shoal.wire.messages import Depth, PromptOutline, Stage

ANCHOR_BOS = 1
# Layers skipped by a model's known name, where a third is too deep: tests/benchmarks/demo_settings.py chose them.
_NUM_SKIPPED = {"smollm2": 6}


@dataclass(frozen=True, slots=True)
class Anchors:
    """SPEED's anchors: the prompt's first ``num_tokens``, or with ``system`` its whole system prompt if that's more."""

    num_tokens: int = ANCHOR_BOS
    system: bool = False

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ConfigError(f"anchors is {self.num_tokens}, but the first token has to be one: say at least 1")

    def count(self, outline: PromptOutline) -> int:
        return max(self.num_tokens, outline.num_system_tokens) if self.system else self.num_tokens


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """``num_layers`` (L) layers of which a shallow token skips the last ``num_skipped`` (S).

    ``num_boundary`` tokens at least, at the prompt's end, are full depth. With ``anchors`` it's a SPEED plan: shallow
    tokens have no K/V in the skipped layers.
    """

    num_layers: int
    num_skipped: int
    num_boundary: int = 1
    anchors: Anchors | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.num_skipped < self.num_layers:
            raise ConfigError(
                f"skip_layers is {self.num_skipped}, but this model has {self.num_layers} layers: "
                f"choose 0 to {self.num_layers - 1}"
            )
        if self.num_boundary < 1:
            raise ConfigError(f"boundary_tokens is {self.num_boundary}: the next token is read off one at least")

    @classmethod
    def default(
        cls,
        num_layers: int,
        num_skipped: int | None = None,
        *,
        num_boundary: int = 1,
        anchors: Anchors | None = None,
        name: str = "",
    ) -> LayerPlan:
        """Unless told how many layers to skip: what suits a model of that ``name``, or a third (the paper's choice)."""
        usual = num_layers // 3 if anchors is not None else _NUM_SKIPPED.get(name, num_layers // 3)
        return cls(num_layers, usual if num_skipped is None else num_skipped, num_boundary, anchors)

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

    @property
    def projects(self) -> bool:
        """Whether shallow tokens have projected K/V in the skipped layers."""
        return self.anchors is None and bool(self.num_skipped)

    def shallow_tokens(self, num_prompt_tokens: int, depth: Depth, outline: PromptOutline | None = None) -> range:
        """Which tokens of a request are shallow: of its prompt all but the last ones and the anchors, or none."""
        if depth is not Depth.SHALLOW or not self.num_skipped:
            return range(0)
        outline = outline or PromptOutline()
        first, num_last = 0, self.num_boundary
        if self.anchors is not None:
            first, num_last = self.anchors.count(outline), max(num_last, outline.num_header_tokens)
        last = num_prompt_tokens - num_last
        return range(first, last) if first < last else range(0)

    @property
    def num_shipped_layers(self) -> int:
        """Layers whose K/V prefill ships: with the projected ones all of them."""
        return self.num_layers if self.anchors is None else self.num_kept

    def layers_held(self, stage: Stage) -> range:
        """The layers whose whole weights (and K/V) a stage holds."""
        return self.kept if stage is Stage.PREFILL else range(self.num_layers)

    def digest(self, *, model_digest: str, kv_dtype: str, projector: str = "paper") -> str:
        """Plan hash: two replicas may exchange K/V only if it's equal. It ends in the model's digest, so that a refusal
        can say whether the models or the plans differ.

        ``projector`` is the digest of a calibrated one. Weight dtype, kernels and block size don't count: a pool
        in int8 may pair with one in bfloat16. Nor does which tokens decode computes itself, anchors or boundary: it
        does so over what was shipped. (For an answer that goes on elsewhere it does: ``resume_digest``.)
        """
        facts = {
            "format": 3,
            "layers": self.num_layers,
            "kept": self.num_kept,
            "shipped": "all layers" if self.anchors is None else "kept layers",
            "projector": projector,
            "kv_dtype": kv_dtype,
        }
        return f"{_digest(facts)}@{model_digest}"

    def resume_digest(self, plan_hash: str) -> str:
        """Of two decode replicas one may go on with the other's answer only if it's equal: beside ``plan_hash`` it says
        which tokens decode computes itself.

        Where that's the last one alone, or all, it is ``plan_hash``, which replicas of earlier releases say.
        """
        if not self.num_skipped or (self.num_boundary == 1 and self.anchors is None):
            return plan_hash
        anchors = None if self.anchors is None else [self.anchors.num_tokens, self.anchors.system]
        return _digest({"plan": plan_hash, "boundary": self.num_boundary, "anchors": anchors})


def short_name(plan_hash: str) -> str:
    """A plan hash for messages: the beginnings of its two digests."""
    return "@".join(digest[:12] for digest in plan_hash.split("@"))


def what_differs(ours: Collection[str], theirs: Collection[str]) -> str:
    """What the operator has to look at if two replicas have no plan hash in common."""
    ours, theirs = ({plan_hash.partition("@")[2] for plan_hash in side} for side in (ours, theirs))
    if ours.isdisjoint(theirs):
        return "the models differ, so both pools must load the same configuration, tokenizer and weights"
    return "the plans differ, so both pools must skip the same layers, and use one projector and KV dtype"


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
