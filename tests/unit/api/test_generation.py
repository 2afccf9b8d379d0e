"""Several prompts as one stream, and what is counted on the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from prometheus_client import CollectorRegistry

from shoal.api.backend import GatewayObserver, Readiness
from shoal.api.exchange import Exchange
from shoal.api.generation import Generation, interleave
from shoal.telemetry import GatewayMetrics
from shoal.wire.messages import (
    Depth,
    FinishReason,
    GenerateRequest,
    RequestContext,
    SamplingParams,
    TokenOutput,
    TtftStages,
)

STAGES = TtftStages(0.1, 0.2, 0.3, 0.4, 0.5)


class Script:
    """A stream under a test's control: items come when they're put, and it knows whether it was closed."""

    def __init__(self) -> None:
        self.items: asyncio.Queue[TokenOutput | Exception | None] = asyncio.Queue()
        self.is_closed = False

    def say(self, *texts: str) -> Script:
        for text in texts:
            self.items.put_nowait(TokenOutput(0, (1,), text))
        return self

    async def stream(self) -> AsyncGenerator[TokenOutput, None]:
        try:
            while (item := await self.items.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.is_closed = True


async def test_a_silent_stream_doesnt_hold_up_the_others() -> None:
    silent, talking = Script(), Script().say("a", "b")
    async with aclosing(interleave([silent.stream(), talking.stream()])) as merged:
        assert [(await anext(merged))[0] for _ in range(2)] == [1, 1]
        silent.say("c")
        assert (await anext(merged))[0] == 0
    assert silent.is_closed and talking.is_closed


# --- counts and times -----------------------------------------------------------------------------------


class TwoStepBackend:
    """Each choice has two tokens, a second apart on ``clock``."""

    now_s = 100.0

    def clock(self) -> float:
        return self.now_s

    async def readiness(self) -> Readiness:
        return Readiness(1, 1)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        num_choices = request.sampling.num_choices
        self.now_s += 2.0
        for choice in range(num_choices):
            yield TokenOutput(choice, (5,), "a", stages=None if choice else STAGES)
        self.now_s += 1.0
        for choice in range(num_choices):
            yield TokenOutput(choice, (6,), "b", finish_reason=FinishReason.LENGTH)


def requests(num_prompts: int, num_choices: int) -> list[GenerateRequest]:
    sampling = SamplingParams(max_tokens=2, num_choices=num_choices)
    context = RequestContext("id", 60)
    return [GenerateRequest(context, "m", (1, 2, 3), Depth.FULL, sampling) for _ in range(num_prompts)]


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    found = registry.get_sample_value(name, labels)
    assert found is not None, name
    return found


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> GatewayObserver:
    return GatewayMetrics(registry, ["m"])


async def test_the_metrics_have_what_the_gateways_clock_says(
    metrics: GatewayObserver, registry: CollectorRegistry
) -> None:
    backend = TwoStepBackend()
    with Exchange("completions", metrics, backend.clock) as exchange:
        assert value(registry, "shoal_requests_in_flight") == 1
        backend.now_s += 0.5
        exchange.model = "m"
        exchange.generation = generation = Generation(
            backend, requests(1, 2), arrived_s=exchange.arrived_s, observer=metrics, clock=backend.clock
        )
        _ = [one async for one in generation.outputs()]
    assert value(registry, "shoal_time_to_first_token_seconds_sum") == 2.5
    assert value(registry, "shoal_ttft_stage_seconds_sum", stage="gateway") == pytest.approx(2.5 - STAGES.total_s)
    assert value(registry, "shoal_ttft_stage_seconds_sum", stage="prefill") == STAGES.prefill_s
    assert value(registry, "shoal_inter_token_latency_seconds_sum") == 2.0
    assert value(registry, "shoal_time_per_output_token_seconds_count") == 2
    assert value(registry, "shoal_request_duration_seconds_sum") == 3.5
    assert value(registry, "shoal_requests_in_flight") == 0
    labels = {"model": "m", "endpoint": "completions", "status": "200", "error_type": "none"}
    assert value(registry, "shoal_requests_total", **labels) == 1
