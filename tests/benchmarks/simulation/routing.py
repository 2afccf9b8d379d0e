"""Which replica of a pool gets a request: as Shoal's router chooses, or an ideal."""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence
from typing import Protocol, TypeVar

import numpy as np


class Routing(enum.StrEnum):
    """``two-choices``: as router.py does, the one of two random replicas that has less to do, or where they share cores
    the busiest that has room. ``shortest``: the one that has the least to do of all."""

    TWO_CHOICES = "two-choices"
    SHORTEST = "shortest"


class Routed(Protocol):
    index: int
    num_ongoing: int


R = TypeVar("R", bound=Routed)


def choose(
    replicas: Sequence[R],
    routing: Routing,
    rng: np.random.Generator,
    excluded: Collection[int] = (),
    *,
    pack_up_to: int = 0,
) -> R:
    """One of those that aren't ``excluded`` (by index), if there is one; else one of all. ``replicas`` isn't empty.

    Router.py's way is the busiest of those with less than ``pack_up_to`` to do, if there is one, else the least busy
    of all."""
    left = [replica for replica in replicas if replica.index not in excluded] if excluded else replicas
    left = left or replicas
    with_room = [replica for replica in left if replica.num_ongoing < pack_up_to]
    if with_room:
        return max(with_room, key=lambda replica: (replica.num_ongoing, -replica.index))
    if pack_up_to:
        return min(left, key=lambda replica: (replica.num_ongoing, replica.index))
    if routing is Routing.TWO_CHOICES and len(left) > 2:
        first = int(rng.integers(len(left)))
        second = (first + 1 + int(rng.integers(len(left) - 1))) % len(left)
        left = (left[first], left[second])
    # Where two are alike, chance decides: the first of a list would get all of a light load.
    fewest = min(replica.num_ongoing for replica in left)
    alike = [replica for replica in left if replica.num_ongoing == fewest]
    return alike[int(rng.integers(len(alike)))] if len(alike) > 1 else alike[0]
