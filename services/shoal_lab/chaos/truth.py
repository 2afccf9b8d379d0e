"""What the answers should be: both stages in this process, without a network, without a fault, in float32.

Sums are added in another order where other requests share a step, so that a choice between two tokens that are as good
as equal may fall either way. How close each choice was is known, and no other difference is let pass.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from shoal.backends.chooser import uniform
from shoal.cluster.local import LocalShoal, open_local
from shoal.config import ShoalConfig
from shoal.wire.messages import TokenLogprob
from shoal_lab.chaos.cases import Case, draw_cases

TIE = 1e-4
"""A gap of logits below which rounding may decide."""

_AT_ONCE = 16
_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Truth:
    """The right tokens, and by which gap of logits each was chosen."""

    token_ids: tuple[int, ...]
    gaps: tuple[float, ...]

    def agrees(self, token_ids: Sequence[int], *, is_complete: bool) -> bool:
        """Whether an answer, or the beginning of one, is this one. After a tie that fell the other way, all may be."""
        for ours, theirs, gap in zip(self.token_ids, token_ids, self.gaps, strict=False):
            if ours != theirs:
                return gap < TIE
        if is_complete:
            return len(token_ids) == len(self.token_ids)
        return len(token_ids) <= len(self.token_ids)


Truths = Mapping[str, tuple[Truth, ...]]
"""By a case's name. There are several while two plans are served: each is right."""


def is_right(truths: Iterable[Truth], token_ids: Sequence[int], *, is_complete: bool) -> bool:
    return any(truth.agrees(token_ids, is_complete=is_complete) for truth in truths)


@dataclass(frozen=True, slots=True)
class Script:
    """What is asked, and the right answers. ``burst`` is what a full pool is filled with; ``skip_layers`` is another
    plan's number, and ``others`` are the answers under it, if they are wanted."""

    cases: tuple[Case, ...]
    burst: tuple[Case, ...]
    skip_layers: int
    truths: Mapping[str, Truth]
    others: Mapping[str, Truth]

    def right(self, *, under_both_plans: bool) -> Truths:
        plans = (self.truths, self.others) if under_both_plans else (self.truths,)
        return {name: tuple(plan[name] for plan in plans) for name in self.truths}


async def write_script(
    config: ShoalConfig,
    *,
    num_cases: int,
    num_burst: int,
    seed: int,
    for_both_plans: bool,
    on_progress: Callable[[str, int, int], None],
) -> Script:
    """Load both stages into this process, and ask them each case; once more with the other plan, if it's wanted."""
    async with open_local(config) as local:
        served = local.decode.served
        cases = draw_cases(num_cases, served.spec.vocab_size, seed)
        burst = draw_cases(num_burst, served.spec.vocab_size, seed, long=True)
        truths = await _ask_all(local, (*cases, *burst), partial(on_progress, "right answers"))
        skip_layers = (served.plan.num_layers - served.plan.num_kept) // 2
    others: dict[str, Truth] = {}
    if for_both_plans:
        model = config.model.model_copy(update={"skip_layers": skip_layers})
        async with open_local(config.model_copy(update={"model": model})) as local:
            others = await _ask_all(local, (*cases, *burst), partial(on_progress, "right answers, other plan"))
    return Script(cases, burst, skip_layers, truths, others)


async def _ask_all(
    local: LocalShoal, cases: Sequence[Case], on_progress: Callable[[int, int], None]
) -> dict[str, Truth]:
    found: dict[str, Truth] = {}
    turns = asyncio.Semaphore(_AT_ONCE)

    async def ask(case: Case) -> None:
        async with turns:
            found[case.name] = await _ask(local, case)
        on_progress(len(found), len(cases))

    async with asyncio.TaskGroup() as group:
        for case in cases:
            group.create_task(ask(case))
    return found


async def _ask(local: LocalShoal, case: Case) -> Truth:
    request = case.request(local.decode.served.name, _TIMEOUT_S)
    told = [one async for output in local.decode.worker.generate(request) for one in output.logprobs]
    gaps = tuple(gap_of(one, case.seed, index) for index, one in enumerate(told))
    return Truth(tuple(one.token_id for one in told), gaps)


def gap_of(chosen: TokenLogprob, seed: int | None, index: int) -> float:
    """By how much logits would have to change for another token; of a greedy choice, or a draw from the best two."""
    (first, _, best), (second, _, next_best), (_, _, third) = chosen.top[:3]
    if seed is None:
        return best - next_best
    # The lower id has the lower part of the distribution, and the number that is drawn lies on one side of its border.
    low, high = (best, next_best) if first < second else (next_best, best)
    border = uniform(seed, 0, index)
    to_border = low - high - math.log(border / (1 - border)) if 0 < border < 1 else math.inf
    return min(abs(to_border), next_best - third)
