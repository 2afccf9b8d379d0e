"""How long decode leaves the cores to prefill, where both pools compute on the same ones.

A step for few answers takes about as much of the cores as one for many. So while prompts are on their way, to this
replica or to another one of these cores (neighbours.py), a step that only goes on with answers waits a little, and then
finds more of them (engine/yielding.py).
"""

from __future__ import annotations

YIELD_S, MAX_YIELD_S = 0.08, 0.2
"""Of one replica, and of as many as there may be: five tokens a second are as many as are read."""


def yield_s_of(num_replicas: int) -> float:
    """From the beginning of a step to that of the next one, of each: two make as many together as one would."""
    return min(MAX_YIELD_S, YIELD_S * num_replicas)
