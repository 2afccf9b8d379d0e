"""What pools could bear at most if no request ever came at a bad moment: where a search for goodput may begin."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from simulation.costs import StepCosts
from simulation.system import Fleet

from shoal.config import ShoalConfig
from shoal_lab.bench.mix import RequestClass


@dataclass(frozen=True, slots=True)
class Bound:
    """Requests a second, of each pool by itself and of all; infinite where a pool has nothing to do."""

    prefill: float
    decode: float
    overall: float


def bound(fleet: Fleet, costs: StepCosts, config: ShoalConfig, mix: Sequence[RequestClass]) -> Bound:
    """Without queues: pools always busy, decode with as many sequences as its limits and the TPOT objective allow.

    Prompts that aren't worth a hand-off are decode's, in steps that it takes anyway.
    """
    shipped_s, own_s = _prompt_s(fleet, costs, config, mix)
    prompt_s, token_s = shipped_s + own_s, _token_s(costs, config, mix)
    num_outputs = _mean(mix, lambda one: _middle(one.output_tokens))
    answer_s = num_outputs * token_s
    serving_s = costs.serving.request_s + num_outputs * costs.serving.token_s
    if fleet.is_shared:
        rate = _rate(1, prompt_s + answer_s + serving_s)
        return Bound(rate, rate, rate)
    if not fleet.num_prefill:
        rate = _rate(fleet.num_decode, prompt_s + answer_s)
        return Bound(math.inf, rate, rate)
    prefill, decode = _rate(fleet.num_prefill, shipped_s), _rate(fleet.num_decode, answer_s + own_s)
    return Bound(prefill, decode, min(prefill, decode))


def _prompt_s(fleet: Fleet, costs: StepCosts, config: ShoalConfig, mix: Sequence[RequestClass]) -> tuple[float, float]:
    """Of a request, on average: what is shipped, and what decode computes itself."""
    cost, chunk = costs.of_skip(fleet.skip_layers), config.prefill.max_step_tokens

    def seconds(one: RequestClass, *, shipped: bool) -> float:
        num = max(0, round(_middle(one.prompt_tokens)) - 1)
        is_shipped = num + 1 >= config.handoff.min_tokens
        if is_shipped is not shipped:
            return 0.0
        if not shipped:  # as a part of a step that is counted already
            return cost.seconds([(0, num)]) - cost.step_s
        return cost.prompt_seconds(num, chunk)

    return _mean(mix, partial(seconds, shipped=True)), _mean(mix, partial(seconds, shipped=False))


def _token_s(costs: StepCosts, config: ShoalConfig, mix: Sequence[RequestClass]) -> float:
    """Of a step, for each of its sequences: as many of them as there may be."""
    context = _mean(mix, lambda one: _middle(one.prompt_tokens) + _middle(one.output_tokens) / 2)
    most = min(config.decode.max_sequences, max(1, int(costs.decode_pool_tokens / context)))
    objective_s = min(one.slo.tpot_ms for one in mix) / 1e3

    def step_s(num: int) -> float:
        return costs.decode.seconds(num, round(num * context))

    num = max((num for num in range(1, most + 1) if step_s(num) <= objective_s), default=1)
    return step_s(num) / num


def _rate(num: int, seconds: float) -> float:
    return num / seconds if seconds else math.inf


def _middle(bounds: tuple[int, int]) -> float:
    return sum(bounds) / 2


def _mean(mix: Sequence[RequestClass], value: Callable[[RequestClass], float]) -> float:
    return sum(one.share * value(one) for one in mix) / sum(one.share for one in mix)
