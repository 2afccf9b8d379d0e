"""Which way a prompt takes, and that prefill's being busy sends it to an idle decode replica alone."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.config import HandoffConfig
from shoal.decode.ways import Ways
from shoal.model.plan import Anchors, LayerPlan
from shoal.telemetry.labels import PromptWay
from shoal.wire.messages import Depth, GenerateRequest, RequestContext, SamplingParams

HANDOFF = HandoffConfig(min_tokens=8, local_tokens=16)
POP = LayerPlan(6, 3)


def request(num_tokens: int, depth: Depth = Depth.SHALLOW, **sampling: Any) -> GenerateRequest:
    params = SamplingParams(**{"max_tokens": 4} | sampling)
    return GenerateRequest(RequestContext("test", 30.0), "tiny", tuple(range(1, num_tokens + 1)), depth, params)


@pytest.mark.parametrize(
    ("plan", "asked", "way"),
    [
        (POP, request(8), PromptWay.HANDED_OFF),
        (POP, request(7), PromptWay.SHORT),
        (POP, request(1), PromptWay.SHORT),
        (POP, request(40, Depth.FULL), PromptWay.FULL_DEPTH),
        (POP, request(40, Depth.FULL, num_prompt_logprobs=1), PromptWay.PROMPT_LOGPROBS),
        (POP, request(40, num_prompt_logprobs=1), PromptWay.PROMPT_LOGPROBS),
        (LayerPlan(6, 0), request(8), PromptWay.HANDED_OFF),
        (LayerPlan(6, 0), request(8, Depth.FULL), PromptWay.HANDED_OFF),
        (LayerPlan(6, 0), request(7, Depth.FULL), PromptWay.SHORT),
        (LayerPlan(6, 3, num_boundary=30), request(36), PromptWay.SHORT),
        (LayerPlan(6, 3, num_boundary=30), request(37), PromptWay.HANDED_OFF),
        (LayerPlan(6, 3, anchors=Anchors(20)), request(27), PromptWay.SHORT),
        (LayerPlan(6, 3, anchors=Anchors(20)), request(28), PromptWay.HANDED_OFF),
    ],
)
def test_what_is_planned(plan: LayerPlan, asked: GenerateRequest, way: PromptWay) -> None:
    assert Ways(plan, HANDOFF).of(asked) is way


@pytest.mark.parametrize(("num_present", "is_so"), [(0, False), (8, False), (16, True), (23, True), (31, True)])
def test_the_rest_of_a_prompt_is_decodes_where_that_is_little(num_present: int, is_so: bool) -> None:
    """32 tokens, of which the boundary token is never prefill's."""
    assert Ways(POP, HANDOFF).is_soon_done(request(32), num_present) is is_so
    assert not Ways(POP, HandoffConfig(local_tokens=0)).is_soon_done(request(32), 16)


def test_only_who_has_nothing_to_do_takes_what_prefill_is_too_busy_for() -> None:
    ways = Ways(POP, HandoffConfig(busy_after_s=1.0))
    with ways.work() as first, ways.work() as second:
        assert not ways.is_better_here(0.99) and ways.is_better_here(1.0)
        first.begin()
        assert not ways.is_better_here(9.0)
        with ways.work() as third:
            third.begin()
        assert not ways.is_better_here(9.0), "the first one isn't done"
        second.begin()
    assert ways.is_better_here(1.0)
    assert not Ways(POP, HANDOFF).is_better_here(3600.0)
