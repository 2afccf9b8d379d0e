"""Where queueing theory has a formula, the simulation comes to its number."""

from __future__ import annotations

import numpy as np
import pytest
from simulation.agenda import Agenda
from simulation.costs import DecodeCost, HandoffCost, PrefillCost, ServingCost, SharingCost
from simulation.setting import Setting
from simulation.system import Fleet, System
from simulations import COSTS, SHIP_ALL, costs, free, request, run

from shoal.config import HandoffConfig, ShoalConfig, StageConfig
from shoal.decode.yielding import YIELD_S
from shoal_lab.bench.workload import PlannedRequest

NUM_PROMPT, SERVICE_S = 101, 0.01
ONE_PROMPT = PrefillCost(skip_layers=0, step_s=0.0, token_s=SERVICE_S / (NUM_PROMPT - 1), token_context_s=0.0)
# A step has room for one prompt, so a prefill replica is a queue of one server.
ONE_A_STEP = ShoalConfig(
    prefill=StageConfig(max_step_tokens=NUM_PROMPT - 1, max_queued=100_000),
    decode=StageConfig(max_sequences=100_000, max_queued=100_000),
    handoff=SHIP_ALL,
)


def poisson(rate: float, num: int, seed: int = 1, **lengths: int) -> list[PlannedRequest]:
    moments = np.random.default_rng(seed).exponential(1 / rate, num).cumsum()
    return [request(index, float(moment), **lengths) for index, moment in enumerate(moments)]


def one_server(rate: float, num: int, seed: int = 1) -> System:
    requests = poisson(rate, num, seed, num_prompt=NUM_PROMPT)
    return run(requests, Fleet(1, 1, 0), free(prefill=(ONE_PROMPT,)), ONE_A_STEP)


def test_a_prefill_replica_serves_in_order_and_is_never_idle_while_a_prompt_waits():
    """Lindley: each prompt begins when it has come and the one before has ended, no earlier and no later."""
    free_s = 0.0
    for record in one_server(80, 2000).records:
        assert record.arrival_s is not None and record.ttft_s is not None
        free_s = max(free_s, record.arrival_s) + SERVICE_S
        assert record.arrival_s + record.ttft_s == pytest.approx(free_s, abs=1e-9)


def test_waiting_is_that_of_a_queue_with_random_arrivals_and_constant_service():
    """M/D/1 (Pollaczek and Khinchine): load * service / (2 * (1 - load)), in five runs' 99 % interval."""
    load = 0.6
    means = [
        np.mean([(record.ttft_s or 0.0) - SERVICE_S for record in one_server(load / SERVICE_S, 1500, seed).records])
        for seed in range(5)
    ]
    half = 4.604 * np.std(means, ddof=1) / np.sqrt(len(means))  # Student's t with 4 degrees of freedom
    expected = load * SERVICE_S / (2 * (1 - load))
    assert abs(np.mean(means) - expected) < half
    assert half < expected / 2  # or nothing would be told apart


def test_as_many_are_in_the_system_as_arrive_while_one_stays():
    """Little: the mean number is the rate times the mean stay, which the records and the system count apart."""
    system = one_server(70, 3000)
    stays_s = [record.e2e_s or 0.0 for record in system.records]
    usage = system.usage
    assert usage.in_flight == pytest.approx(len(stays_s) / usage.window_s * np.mean(stays_s), rel=1e-9)
    assert usage.in_flight > 0.7


def test_busy_time_is_the_work_that_came():
    system = one_server(50, 1000)
    usage = system.usage
    assert usage.prefill_busy * usage.window_s == pytest.approx(1000 * SERVICE_S)
    assert usage.num_prefill_steps == 1000


def test_a_request_alone_takes_the_sum_of_its_stages():
    known = free(
        prefill=(PrefillCost(skip_layers=0, step_s=0.1, token_s=0.01, token_context_s=0.001),),
        decode=DecodeCost(step_s=0.2, sequence_s=0.02, context_token_s=0.002),
        handoff=HandoffCost(latency_s=0.3, bytes_per_s=100.0, token_bytes=5),
        serving=ServingCost(request_s=0.4, step_s=0.05, token_s=0.006),
    )
    [record] = run([request(0, 7.0, num_prompt=11, num_output=3)], Fleet(1, 1, 0), known).records
    prompt_s = 0.1 + 10 * 0.01 + (10 * 11 / 2) * 0.001
    handed_off_s = 0.4 + prompt_s + 10 * 5 / 100 + 0.3
    steps_s = [0.2 + 0.02 + seen * 0.002 for seen in (11, 12, 13)]
    assert record.ttft_s == pytest.approx(handed_off_s + steps_s[0] + 0.056)
    assert record.e2e_s == pytest.approx(handed_off_s + sum(steps_s) + 0.056)
    assert record.itl_s == pytest.approx(steps_s[1:])


def test_chunks_travel_while_the_next_are_computed_and_only_the_tail_shows():
    """Four chunks of 10 tokens; one takes 1 s to compute, and less than that to send."""
    cost = PrefillCost(skip_layers=0, step_s=0.0, token_s=0.1, token_context_s=0.0)
    config = ShoalConfig(prefill=StageConfig(max_step_tokens=10), handoff=SHIP_ALL)

    def ttft_s(bytes_per_s: float) -> float | None:
        handoff = HandoffCost(latency_s=0.0, bytes_per_s=bytes_per_s, token_bytes=10)
        return run([request(0, 0.0, num_prompt=41)], Fleet(1, 1, 0), free(prefill=(cost,), handoff=handoff), config)\
            .records[0].ttft_s  # fmt: skip

    assert ttft_s(200) == pytest.approx(4 + 0.5)
    # A chunk takes 3 s of wire: with two ahead of it, computing waits, and the wire never does after the first.
    assert ttft_s(100 / 3) == pytest.approx(1 + 4 * 3)


@pytest.mark.parametrize(("yield_s", "meanwhile"), [(0.05, [0.05] * 20 + [0.02]), (0.0, [0.01] * 102)])
def test_decode_yields_while_a_prompt_is_on_its_way_and_takes_it_along_at_once(yield_s: float, meanwhile: list[float]):
    known = free(
        prefill=(PrefillCost(skip_layers=0, step_s=0.0, token_s=0.0102, token_context_s=0.0),),  # 1.02 s a prompt
        decode=DecodeCost(step_s=0.01, sequence_s=0.0, context_token_s=0.0),
    )
    config = ShoalConfig(handoff=HandoffConfig(min_tokens=2, yield_s=yield_s))
    requests = [request(0, 0.0, num_prompt=1, num_output=140), request(1, 0.125, num_output=2)]
    answer, prompt = run(requests, Fleet(1, 1, 0), known, config).records
    gaps = [round(gap, 9) for gap in answer.itl_s]
    assert gaps == [0.01] * 13 + meanwhile + [0.01] * (139 - 13 - len(meanwhile))
    assert prompt.ttft_s == pytest.approx(0.005 + 1.02 + 0.01)


@pytest.mark.parametrize(
    ("of_prefill", "of_answers", "of_decode"),
    [(None, None, 1.25**4 / (1 + 1.25**4)), (0, None, 1 / 2), (0, 4, 1 / (1 + 1.25**4)), (6, 6, 1 / 2)],
)
def test_prefill_steps_back_for_decode_on_the_same_cores(
    of_prefill: int | None, of_answers: int | None, of_decode: float
):
    """While a prompt's one step of 1 s runs, an answer's get this share of the cores, and the prompt the rest."""
    known = free(
        prefill=(PrefillCost(skip_layers=0, step_s=1.0, token_s=0.0, token_context_s=0.0),),
        decode=DecodeCost(step_s=0.01, sequence_s=0.0, context_token_s=0.0),
        sharing=SharingCost(cores=2, threads=2, efficiency=1.0),
    )
    config = ShoalConfig(
        prefill={"niceness": of_prefill},
        decode={"niceness": of_answers},
        handoff=HandoffConfig(min_tokens=2, yield_s=0.0),
    )
    requests = [request(0, 0.0, num_prompt=1, num_output=600), request(1, 0.125, num_output=1)]
    answer, prompt = run(requests, Fleet(1, 1, 0, is_shared=True), known, config).records
    assert answer.itl_s[20:40] == pytest.approx([0.01 / of_decode] * 20)
    assert prompt.ttft_s == pytest.approx(1 / (1 - of_decode) + 0.01, rel=0.01)


@pytest.mark.parametrize(("is_shared", "meanwhile"), [(True, [0.05] * 20 + [0.03]), (False, [])])
def test_decode_yields_to_prompts_on_their_way_to_another_replica_of_the_same_cores(
    is_shared: bool, meanwhile: list[float]
):
    known = free(
        prefill=(PrefillCost(skip_layers=0, step_s=0.0, token_s=0.0102, token_context_s=0.0),),  # 1.02 s a prompt
        decode=DecodeCost(step_s=0.01, sequence_s=0.0, context_token_s=0.0),
        # Too few for the threads of both pools, and yet two steps at once take no longer than one.
        sharing=SharingCost(cores=3, threads=2, efficiency=4 / 3),
    )
    # Whose threads are equals.
    config = ShoalConfig(
        prefill={"niceness": 0}, decode={"pack_up_to": 0}, handoff=HandoffConfig(min_tokens=2, yield_s=0.05)
    )
    requests = [request(0, 0.0, num_prompt=1, num_output=140), request(1, 0.125, num_output=2)]
    answer, prompt = run(requests, Fleet(1, 2, 0, is_shared=is_shared), known, config).records
    gaps = [round(gap, 9) for gap in answer.itl_s]
    # It looks each 0.02 s after a step whether that is over, and so finds it 0.005 s later.
    assert gaps == [0.01] * 12 + meanwhile + [0.01] * (139 - 12 - len(meanwhile))
    assert prompt.ttft_s == pytest.approx(1.02 + 0.01)


@pytest.mark.parametrize(
    ("configured", "is_shared", "num_decode", "expected"),
    [(None, True, 1, YIELD_S), (None, True, 2, 2 * YIELD_S), (None, False, 2, 0.0), (0.3, False, 2, 0.3)],
)
def test_replicas_yield_where_they_share_a_machine_or_are_told_to(
    configured: float | None, is_shared: bool, num_decode: int, expected: float
):
    config = ShoalConfig(handoff=HandoffConfig(yield_s=configured))
    assert Setting(Agenda(), COSTS, config, 0).yield_s(num_decode, is_shared=is_shared) == expected
    roomy = costs(sharing=SharingCost(cores=4, threads=2, efficiency=0.9))
    assert Setting(Agenda(), roomy, config, 0).yield_s(num_decode, is_shared=is_shared) == (configured or 0.0)


def test_without_prefill_replicas_decode_computes_prompts():
    known = free(prefill=(ONE_PROMPT,))
    system = run([request(0, 0.0, num_output=2)], Fleet(0, 1, 0), known)
    assert system.records[0].ttft_s == pytest.approx(SERVICE_S * NUM_PROMPT / (NUM_PROMPT - 1))
    assert system.usage.wire_bytes == 0 and system.usage.num_fallbacks == 0
