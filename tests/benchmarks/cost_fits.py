"""From what tests/benchmarks/step_costs.py measured to the costs that explain it, each with how far it is from it.

A sample is what was asked for, and how many seconds that took: an entry of ``StepCosts.samples``.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from simulation.costs import DecodeCost, FitQuality, HandoffCost, PrefillCost, ServingCost, SharingCost, seen

from shoal.errors import ConfigError

Sample = dict[str, Any]
Cost = TypeVar("Cost", PrefillCost, DecodeCost)
_AROUND = ("queue_s", "reserve_s", "transfer_exposed_s")
"""The stages of a first token before and behind prefill's, and before the step that makes it."""
_ALIKE = 1e-9
"""Sums of squares of relative errors that differ by rounding alone."""
_LEAST_LONGER = 0.1
"""Work that makes a step longer by less of its own time can't be told from the noise."""


def prefill_cost(skip_layers: int, samples: Sequence[Sample]) -> tuple[PrefillCost, FitQuality]:
    """Of steps from ``start`` to ``end`` in prompts that were cut in pieces of ``chunk``. Each size of pieces counts as
    much as another, however many of them a prompt has."""
    terms = [(1.0, one["end"] - one["start"], seen(one["start"], one["end"]), one["end"]) for one in samples]
    num_alike = Counter(one["chunk"] for one in samples)
    weights = [1 / num_alike[one["chunk"]] for one in samples]
    found, quality = fit(terms, [one["seconds"] for one in samples], weights=weights)
    names = ("step_s", "token_s", "token_context_s", "context_token_s")
    return PrefillCost(skip_layers=skip_layers, **dict(zip(names, found, strict=True))), quality


def decode_cost(samples: Sequence[Sample]) -> tuple[DecodeCost, FitQuality]:
    """Of steps of ``streams``, each of which sees ``context``; with as many free sequences as bring it nearest, the
    fewest where several do, and fewer than two of the numbers of streams: one alone tells nothing of the next ones."""

    def with_free(num_free: int) -> tuple[DecodeCost, FitQuality]:
        terms = [(1.0, max(0, one["streams"] - num_free), one["streams"] * one["context"]) for one in samples]
        found, quality = fit(terms, [one["seconds"] for one in samples])
        names = ("step_s", "sequence_s", "context_token_s")
        return DecodeCost(**dict(zip(names, found, strict=True)), free_sequences=num_free), quality

    def squares(cost: DecodeCost) -> float:
        times = ((_step_s(cost, one), one["seconds"]) for one in samples)
        return math.fsum((said_s / took_s - 1) ** 2 for said_s, took_s in times)

    second = sorted({0, *(one["streams"] for one in samples)})[-2]
    found = [with_free(num_free) for num_free in range(max(1, second))]
    least = min(squares(cost) for cost, _ in found)
    return next(one for one in found if squares(one[0]) <= least + _ALIKE)


def server_slowdown(prefill: PrefillCost, alone: Sequence[Sample], chunk: int) -> tuple[float, float, FitQuality]:
    """Of prompts one at a time: how many times as long as by themselves prefill's steps take in a server, 1 at least,
    and what the way to them takes beside, in seconds. Raises ConfigError unless they differ in length."""
    shipped = _shipped(alone)
    if len({one["prompt_tokens"] for one in shipped}) < 2:
        raise ConfigError("two prompts of different length must be handed over: ask for longer ones")
    steps_s = [prefill.prompt_seconds(one["prompt_tokens"] - 1, chunk) for one in shipped]
    terms = [(1.0, each_s) for each_s in steps_s]
    (way_s, slower), quality = fit(terms, [one["prefill_s"] for one in shipped], steps_s)
    return 1 + slower, way_s, quality


def slowed(cost: Cost, slower: float) -> Cost:
    """All of its times, so many times as long."""
    times = {name: value for name, value in cost.model_dump().items() if name.endswith("_s")}
    return cost.model_copy(update={name: slower * seconds for name, seconds in times.items()})


def handoff_cost(alone: Sequence[Sample], way_s: float, token_bytes: int, chunk: int) -> tuple[HandoffCost, FitQuality]:
    """Of prompts one at a time: a latency, ``way_s`` included, and the last chunk's bytes."""
    shipped = _shipped(alone)
    tails = [token_bytes * ((one["prompt_tokens"] - 2) % chunk + 1) for one in shipped]
    times = [sum(one[name] for name in _AROUND) for one in shipped]
    (latency_s, byte_s), quality = fit([(1.0, tail) for tail in tails], times)
    cost = HandoffCost(latency_s=way_s + latency_s, bytes_per_s=1 / max(byte_s, 1e-12), token_bytes=token_bytes)
    return cost, quality


def serving_cost(
    alone: Sequence[Sample], together: Sequence[Sample], decode: DecodeCost, sharing: SharingCost
) -> tuple[ServingCost, float, FitQuality]:
    """What a request works outside of the engines, of prompts one at a time; a step's way to its clients, from how much
    longer it makes the steps beside it, of ``streams`` together; and how many times as long as by themselves decode's
    steps take in a server, 1 at least.

    That work has one thread and a step ``sharing.threads``. While both run, either advances at the speed that the
    simulation gives them, v; so work w makes a step w (1 / v - 1) longer. Where that is next to nothing, as with cores
    for all of them, so is what is found of it, and decode's steps have all of the difference.
    """
    num_threads = sharing.threads + 1
    speed = 1.0 if num_threads <= sharing.cores else min(1.0, sharing.efficiency * sharing.cores / num_threads)
    longer = 1 / speed - 1 if 1 / speed - 1 >= _LEAST_LONGER else 0.0
    steps_s = [_step_s(decode, one) for one in together]
    terms = [(longer, longer * one["streams"], each_s) for one, each_s in zip(together, steps_s, strict=True)]
    (step_s, token_s, slower), quality = fit(terms, [one["tpot_s"] for one in together], steps_s)
    rests = [one["ttft_s"] - sum(one[name] for name in (*_AROUND, "prefill_s", "boundary_step_s")) for one in alone]
    request_s = max(0.0, statistics.median(rests) - step_s - token_s)
    return ServingCost(request_s=request_s, step_s=step_s, token_s=token_s), 1 + slower, quality


def _shipped(alone: Sequence[Sample]) -> list[Sample]:
    """Without prompts that decode computed itself, for they are short."""
    return [one for one in alone if one["transfer_exposed_s"] > 0]


def _step_s(decode: DecodeCost, sample: Sample) -> float:
    return decode.seconds(sample["streams"], sample["streams"] * sample["context"])


# --- a formula's coefficients ---------------------------------------------------------------------------


def fit(
    features: Sequence[Sequence[float]],
    seconds: Sequence[float],
    known: Sequence[float] | None = None,
    *,
    weights: Sequence[float] | None = None,
) -> tuple[list[float], FitQuality]:
    """Coefficients ``x >= 0`` for which ``features @ x``, and what is ``known`` of each time already, is nearest to
    ``seconds``, by the squares of relative errors, each times its weight, if there are any: those of a short step count
    as much as those of a long one.

    ``features`` is [samples, coefficients]. With few coefficients, the least non-negative solution is found by trying
    which of them are 0. Raises ConfigError if there are fewer samples than coefficients, or a time isn't positive.
    """
    matrix = np.asarray(features, dtype=np.float64)
    times = np.asarray(seconds, dtype=np.float64)
    if matrix.ndim != 2 or len(matrix) != len(times) or len(times) < matrix.shape[1]:
        raise ConfigError(f"{len(times)} times can't tell the coefficients of a formula: measure more of them")
    if not (times > 0).all():
        raise ConfigError("a step took no time: measure again")
    relative = matrix / times[:, None]
    left = 1 - (np.zeros(len(times)) if known is None else np.asarray(known, dtype=np.float64)) / times
    roots = np.ones(len(times)) if weights is None else np.sqrt(np.asarray(weights, dtype=np.float64))
    best, least = np.zeros(matrix.shape[1]), float(((left * roots) ** 2).sum())
    for num in range(1, matrix.shape[1] + 1):
        for chosen in itertools.combinations(range(matrix.shape[1]), num):
            found = _solve(relative * roots[:, None], left * roots, chosen)
            error = float((((relative @ found - left) * roots) ** 2).sum())
            if (found >= 0).all() and error < least:
                best, least = found, error
    errors = np.abs(relative @ best - left)
    quality = FitQuality(num=len(times), median_error=float(np.median(errors)), max_error=float(errors.max()))
    return best.tolist(), quality


def _solve(
    matrix: npt.NDArray[np.float64], wanted: npt.NDArray[np.float64], chosen: tuple[int, ...]
) -> npt.NDArray[np.float64]:
    columns = matrix[:, chosen]
    # Coefficients differ by ten orders of magnitude: columns of one length keep the solution exact.
    lengths = np.linalg.norm(columns, axis=0)
    lengths[lengths == 0] = 1.0
    found = np.zeros(matrix.shape[1])
    found[list(chosen)] = np.linalg.lstsq(columns / lengths, wanted, rcond=None)[0] / lengths
    return found
