"""One arm, measured once: warmed up, asked alone, asked by many at once, and looked at for what it really did."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx
from arms import MODEL_NAME, Arm
from load import Loads, span_s
from prometheus_client.parser import text_string_to_metric_families

from shoal.config import HandoffConfig
from shoal_lab.bench.clock import RealClock
from shoal_lab.bench.endpoint import Endpoint, EndpointOptions, open_endpoint
from shoal_lab.bench.record import Record
from shoal_lab.bench.workload import PlannedRequest

_TRANSFERS = "shoal_kv_transfer_seconds_count"


class WrongAnswer(Exception):
    """A request failed, or was answered otherwise than asked, so that its time says nothing."""


@dataclass(frozen=True, slots=True)
class Figures:
    """As the client saw it; each sample of ``ttft_s`` and ``tpot_s`` is a long prompt asked alone.

    ``tokens_per_s`` has for each number of streams all their output tokens over the time from the first request's
    sending to the last token's arrival: prompts are in it, as for users.
    """

    start_s: float
    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]
    tokens_per_s: dict[int, float]


async def measure(
    arm: Arm, url: str, loads: Loads, key: str, *, start_s: float, samples: int, streams: Sequence[int],
    on_step: Callable[[str], None],
) -> Figures:  # fmt: skip
    """``key`` names the round: the same key gives every arm the same prompts. Raises WrongAnswer."""
    async with open_endpoint(_options(arm, url, batch=1), RealClock()) as endpoint:
        on_step("warm-up")
        await _ask(endpoint, [loads.alone("warm-up", 4)])
        if streams:
            await _ask_together(arm, url, loads.together("warm-up", max(streams), 4))
        before = 0.0 if arm.is_handed_off is None else _num_transfers(url)
        alone: list[Record] = []
        for sample in range(samples):
            on_step(f"alone {sample + 1}/{samples}")
            alone += await _ask(endpoint, [loads.alone(f"{key}, {sample}")])
    rates = {}
    for num_streams in streams:
        on_step(f"{num_streams} streams")
        rates[num_streams] = _rate(await _ask_together(arm, url, loads.together(key, num_streams)))
    if arm.is_handed_off is not None:
        is_worth_it = loads.options.stream_prompt_tokens >= HandoffConfig().min_tokens
        num_requests = samples + (sum(streams) if is_worth_it else 0)
        _check_hand_off(arm, _num_transfers(url) - before, num_requests)
    return Figures(
        start_s,
        ttft_s=tuple(record.ttft_s for record in alone if record.ttft_s is not None),
        tpot_s=tuple(record.tpot_s for record in alone if record.tpot_s is not None),
        tokens_per_s=rates,
    )


async def _ask_together(arm: Arm, url: str, requests: Sequence[PlannedRequest]) -> list[Record]:
    async with open_endpoint(_options(arm, url, batch=len(requests)), RealClock()) as endpoint:
        return await _ask(endpoint, requests)


def _options(arm: Arm, url: str, batch: int) -> EndpointOptions:
    told = {} if arm.batch_field is None else {arm.batch_field: batch}
    return EndpointOptions(url, model=MODEL_NAME, extra_body={**arm.extra_body, **told}, timeout_s=300)


async def _ask(endpoint: Endpoint, requests: Sequence[PlannedRequest]) -> list[Record]:
    bodies = [endpoint.body(request) for request in requests]
    records = await asyncio.gather(
        *(endpoint.send(request, body, 0.0) for request, body in zip(requests, bodies, strict=True))
    )
    for request, record in zip(requests, records, strict=True):
        if record.failure is not None:
            raise WrongAnswer(f"a request failed ({record.failure}): {record.detail}")
        if record.output_tokens != request.max_tokens:
            raise WrongAnswer(f"{record.output_tokens} tokens came instead of {request.max_tokens}")
        if record.prompt_tokens not in {None, request.prompt_tokens}:
            raise WrongAnswer(f"a prompt of {request.prompt_tokens} tokens was read as {record.prompt_tokens}")
    return records


def _rate(records: Sequence[Record]) -> float:
    return sum(record.output_tokens for record in records) / span_s(records)


def _num_transfers(url: str) -> float:
    """By the metrics of all processes."""
    with httpx.Client(trust_env=False, timeout=10) as client:
        targets = [target for group in client.get(f"{url}/metrics/targets").json() for target in group["targets"]]
        return sum(_transfers(client.get(f"http://{target}/metrics").text) for target in targets)


def _check_hand_off(arm: Arm, num_transfers: float, num_requests: int) -> None:
    """A fallback would answer as well, and be another arm."""
    if arm.is_handed_off and num_transfers != num_requests:
        raise WrongAnswer(f"{num_transfers:.0f} prompts were handed off, and {num_requests} should be")
    if not arm.is_handed_off and num_transfers:
        raise WrongAnswer(f"{num_transfers:.0f} prompts were handed off, and none should be")


def _transfers(metrics: str) -> float:
    return sum(
        sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.name == _TRANSFERS
    )
