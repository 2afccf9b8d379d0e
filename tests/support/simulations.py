"""Simulations whose outcome is known by arithmetic: costs that are round numbers, or zero."""

from __future__ import annotations

from typing import Any

from simulation.costs import DecodeCost, HandoffCost, PrefillCost, ServingCost, SharingCost, StepCosts
from simulation.system import Fleet, System

from shoal.config import HandoffConfig, ShoalConfig
from shoal_lab.bench.workload import PlannedRequest

COSTS = StepCosts(
    format=1,
    machine="a machine of round numbers",
    model="a model",
    num_layers=30,
    prefill=(
        PrefillCost(skip_layers=0, step_s=0.004, token_s=0.0003, token_context_s=0.0),
        PrefillCost(skip_layers=10, step_s=0.004, token_s=0.0002, token_context_s=0.0),
    ),
    decode=DecodeCost(step_s=0.008, sequence_s=0.0005, context_token_s=1e-6),
    handoff=HandoffCost(latency_s=0.01, bytes_per_s=2e9, token_bytes=20_000),
    serving=ServingCost(request_s=0.005, step_s=0.001, token_s=0.0001),
    prefill_pool_tokens=200_000,
    decode_pool_tokens=200_000,
    sharing=SharingCost(cores=2, threads=2, efficiency=0.9),
)
SHIP_ALL = HandoffConfig(min_tokens=2)
"""All prompts are handed over, however short."""
FREE = {
    "prefill": (PrefillCost(skip_layers=0, step_s=0.0, token_s=0.0, token_context_s=0.0),),
    "decode": DecodeCost(step_s=0.0, sequence_s=0.0, context_token_s=0.0),
    "handoff": HandoffCost(latency_s=0.0, bytes_per_s=1e30, token_bytes=1),
    "serving": ServingCost(request_s=0.0, step_s=0.0, token_s=0.0),
}
"""Everything costs nothing but for what a test says."""


def costs(**fields: Any) -> StepCosts:
    return COSTS.model_copy(update=fields)


def free(**fields: Any) -> StepCosts:
    return costs(**{**FREE, **fields})


def request(index: int, arrival_s: float, num_prompt: int = 101, num_output: int = 1) -> PlannedRequest:
    return PlannedRequest(index, "any", (), num_prompt, num_output, arrival_s)


def run(
    requests: list[PlannedRequest], fleet: Fleet, known: StepCosts = COSTS, config: ShoalConfig | None = None
) -> System:
    """The system after all of it; that nothing is held any more, it checks itself."""
    system = System(fleet, known, config or ShoalConfig(handoff=SHIP_ALL), seed=0)
    system.offer(requests)
    system.run()
    return system
