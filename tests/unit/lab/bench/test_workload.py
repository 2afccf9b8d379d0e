"""The same seed gives the same requests at the same times, and loads share none."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from shoal_lab.bench.load import Load
from shoal_lab.bench.mix import Slo, parse_mix
from shoal_lab.bench.workload import PromptKind, Workload

MIX = parse_mix("20-30:4-6:3,5:2:1", Slo(1000, 100))
LOAD = Load(rate=4.0)


def workload(seed: int = 0, prompts: PromptKind = PromptKind.IDS) -> Workload:
    return Workload(MIX, prompts=prompts, token_ids=(10, 50), seed=seed)


@pytest.mark.parametrize("prompts", list(PromptKind))
def test_the_same_seed_gives_the_same_requests_whoever_asks(prompts: PromptKind):
    one, other = workload(prompts=prompts), workload(prompts=prompts)
    assert one.arrivals(4.0, 50) == other.arrivals(4.0, 50)
    backwards = [other.request(LOAD, index) for index in reversed(range(50))]
    assert [one.request(LOAD, index) for index in range(50)] == backwards[::-1]
    assert one.probe(1) == other.probe(1)


def test_seeds_loads_and_indices_share_no_prompt():
    requests = [
        workload(seed).request(load, index)
        for seed in (0, 1) for load in (LOAD, Load(rate=8.0), Load(concurrency=4)) for index in range(20)
    ]  # fmt: skip
    long = [request.prompt for request in requests if request.kind == MIX[0].name]
    assert len(set(long)) == len(long) > 60
    assert workload(0).arrivals(4.0, 9) != workload(1).arrivals(4.0, 9)


def test_loads_differ_in_nothing_but_the_load():
    one, other = ([workload().request(load, index) for index in range(50)] for load in (LOAD, Load(concurrency=9)))
    assert [(a.kind, a.prompt_tokens, a.max_tokens) for a in one] == [
        (b.kind, b.prompt_tokens, b.max_tokens) for b in other
    ]
    assert workload().arrivals(2.0, 9) == pytest.approx([2 * moment for moment in workload().arrivals(4.0, 12)[:9]])


def test_arrivals_are_a_poisson_process_of_the_rate():
    arrivals = workload().arrivals(4.0, 20_000)
    gaps = np.diff([0.0, *arrivals])
    assert arrivals == sorted(arrivals) and gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 4, rel=0.03)
    # Of an exponential distribution, the deviation is the mean, and exp(-1) of all gaps are longer than it.
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert (gaps > 1 / 4).mean() == pytest.approx(np.exp(-1), abs=0.02)
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 0.03


def test_requests_are_of_the_mix():
    requests = [workload().request(LOAD, index, arrival_s=1.5, is_counted=False) for index in range(2000)]
    counts = Counter(request.kind for request in requests)
    assert counts[MIX[0].name] / 2000 == pytest.approx(0.75, abs=0.03)
    long = [request for request in requests if request.kind == MIX[0].name]
    assert {request.prompt_tokens for request in long} == set(range(20, 31))
    assert {request.max_tokens for request in long} == {4, 5, 6}
    assert all(len(request.prompt) == request.prompt_tokens for request in requests)
    assert {one for request in requests for one in request.prompt} == set(range(10, 51))
    assert {(request.arrival_s, request.is_counted) for request in requests} == {(1.5, False)}
