"""Costs from samples that are known to follow them, and from some that don't quite."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from cost_fits import decode_cost, handoff_cost, prefill_cost, server_slowdown, serving_cost, slowed
from simulation.costs import DecodeCost, PrefillCost, ServingCost, SharingCost

from shoal.errors import ConfigError

PREFILL = PrefillCost(skip_layers=10, step_s=2e-3, token_s=4e-4, token_context_s=1e-7, context_token_s=5e-6)
DECODE = DecodeCost(step_s=9e-3, sequence_s=7e-4, context_token_s=8e-7, free_sequences=5)


def of_prompts(noise: random.Random | None = None) -> list[dict[str, Any]]:
    """Pieces of prompts of 4,096 tokens, in four sizes."""
    return [
        {
            "chunk": chunk,
            "start": start,
            "end": start + chunk,
            "seconds": PREFILL.seconds([(start, start + chunk)]) * (noise.uniform(0.9, 1.1) if noise else 1.0),
        }
        for chunk in (64, 256, 1024, 2048)
        for start in range(0, 4096, chunk)
    ]


def test_prefills_are_found_again():
    found, quality = prefill_cost(10, of_prompts())
    for name, value in PREFILL.model_dump().items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-5)
    assert quality.num == 64 + 16 + 4 + 2 and quality.max_error < 1e-9


def test_a_size_of_pieces_counts_as_much_however_often_it_was_measured():
    samples = of_prompts(random.Random(1))
    repeated = samples + 3 * [one for one in samples if one["chunk"] == 64]
    found, more = prefill_cost(10, samples)[0].model_dump(), prefill_cost(10, repeated)[0].model_dump()
    assert found == pytest.approx(more, rel=1e-6)
    assert found != pytest.approx(PREFILL.model_dump(), rel=1e-2), "noise that changes nothing would show nothing"


def test_decodes_are_found_again_and_how_many_sequences_cost_no_more_than_one():
    samples = [
        {"streams": streams, "context": context, "seconds": DECODE.seconds(streams, streams * context)}
        for streams, context in itertools.product((1, 2, 4, 8, 16, 32), (64, 512, 2048))
    ]
    found, quality = decode_cost(samples)
    assert found.model_dump() == pytest.approx(DECODE.model_dump(), rel=1e-5)
    assert quality.max_error < 1e-9


@pytest.mark.parametrize(("streams", "expected"), [((1, 2, 4, 8, 16, 32), 15), ((8,), 0), ((1, 64), 0)])
def test_what_one_number_of_streams_alone_tells_is_not_taken_for_a_slope(streams: tuple[int, ...], expected: int):
    """Flat up to 16, as if 16 to 31 were free: from 9 on each has the same to say of what was measured."""
    samples = [
        {"streams": num, "context": context, "seconds": 0.01 + (0.008 if num == 32 else 0.0)}
        for num, context in itertools.product(streams, (1, 2, 3))
    ]
    found, _ = decode_cost(samples)
    assert found.free_sequences <= expected


def alone(prompt_tokens: int, **stages: float) -> dict[str, Any]:
    none = dict.fromkeys(("queue_s", "reserve_s", "prefill_s", "transfer_exposed_s", "boundary_step_s"), 0.0)
    return {"prompt_tokens": prompt_tokens, **none, **stages}


def test_a_server_s_prefill_and_what_lies_around_it():
    """In pieces of 1,000, its steps 1.1 times as long and 0.01 s on the way to them; then 1 GB/s for the last one's
    bytes, and 0.01 s in all three other stages."""
    samples = [alone(33, prefill_s=9.0)]  # decode's own
    for num, pieces in ((501, [(0, 500)]), (1801, [(0, 1000), (1000, 1800)]), (2001, [(0, 1000), (1000, 2000)])):
        steps_s = 1.1 * sum(PREFILL.seconds([piece]) for piece in pieces)
        tail_s = (pieces[-1][1] - pieces[-1][0]) * 20_000 / 1e9
        around = {"queue_s": 0.004, "reserve_s": 0.001, "transfer_exposed_s": 0.005 + tail_s}
        samples.append(alone(num, prefill_s=steps_s + 0.01, **around))
    slower, way_s, quality = server_slowdown(PREFILL, samples, 1000)
    assert (slower, way_s) == pytest.approx((1.1, 0.01), rel=1e-5)
    assert quality.num == 3 and quality.max_error < 1e-9
    found, quality = handoff_cost(samples, way_s, 20_000, 1000)
    assert found.model_dump() == pytest.approx({"latency_s": 0.02, "bytes_per_s": 1e9, "token_bytes": 20_000}, rel=1e-5)
    assert quality.num == 3 and quality.max_error < 1e-9
    slow = slowed(PREFILL, slower)
    assert slow.seconds([(0, 1000), (200, 300)]) == pytest.approx(1.1 * PREFILL.seconds([(0, 1000), (200, 300)]))
    assert slow.skip_layers == 10 and slowed(DECODE, 2.0).free_sequences == 5


def test_prompts_of_one_length_tell_no_slowness():
    with pytest.raises(ConfigError, match="different length"):
        server_slowdown(PREFILL, [alone(33), *5 * [alone(1000, prefill_s=1.0, transfer_exposed_s=0.01)]], 1000)


@pytest.mark.parametrize(("cores", "efficiency"), [(3, 1.2), (2, 1.45), (2, 1.6)])
def test_where_serving_makes_no_step_longer_all_of_the_difference_is_the_steps(cores: int, efficiency: float):
    together = [
        {"streams": streams, "context": 50, "tpot_s": times * DECODE.seconds(streams, streams * 50)}
        for streams, times in ((1, 1.3), (4, 1.29), (8, 1.3), (16, 1.31))
    ]
    sharing = SharingCost(cores=cores, threads=2, efficiency=efficiency)
    found, slower, _ = serving_cost([alone(32, ttft_s=0.25)], together, DECODE, sharing)
    assert found == ServingCost(request_s=0.25, step_s=0.0, token_s=0.0)
    assert slower == pytest.approx(1.3, rel=1e-3)


def test_serving_is_what_makes_steps_longer_and_what_stages_leave_of_a_first_token():
    """A thread beside a step's two: on two cores each gets two thirds, and 1.2 of that done. Steps take 1.3 times as
    long as by themselves."""
    longer = 1 / (1.2 * 2 / 3) - 1
    truth = ServingCost(request_s=0.01, step_s=2e-3, token_s=1e-4)
    together = [
        {
            "streams": streams,
            "context": context,
            "tpot_s": 1.3 * DECODE.seconds(streams, streams * context)
            + longer * (truth.step_s + truth.token_s * streams),
        }
        for streams, context in ((1, 50), (4, 50), (8, 50), (16, 50), (1, 2000))
    ]
    stages = {"queue_s": 0.1, "reserve_s": 0.2, "prefill_s": 0.3, "transfer_exposed_s": 0.4, "boundary_step_s": 0.5}
    first_s = truth.request_s + truth.step_s + truth.token_s
    asked = [alone(num, ttft_s=1.5 + first_s + late_s, **stages) for num, late_s in ((32, -0.005), (512, 0), (1800, 1))]
    sharing = SharingCost(cores=2, threads=2, efficiency=1.2)
    found, slower, quality = serving_cost(asked, together, DECODE, sharing)
    assert slower == pytest.approx(1.3)
    assert found.model_dump() == pytest.approx(truth.model_dump(), rel=1e-5)
    assert quality.num == 5 and quality.max_error < 1e-9
