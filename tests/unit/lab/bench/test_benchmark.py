"""From loads to goodput: what is measured, in which order, and what is kept."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from bench_records import MIX, failed, level
from pydantic import TypeAdapter
from scripted_endpoint import HandClock, VirtualClock, scripted

from shoal.errors import ConfigError, Unavailable
from shoal_lab.bench.benchmark import Benchmark, BenchOptions, measure, probe
from shoal_lab.bench.endpoint import EndpointOptions, open_endpoint
from shoal_lab.bench.generator import Amount
from shoal_lab.bench.level import Level
from shoal_lab.bench.load import Load
from shoal_lab.bench.mix import Slo, parse_mix
from shoal_lab.bench.record import Failure, Record
from shoal_lab.bench.workload import PlannedRequest, PromptKind, Workload

OPTIONS = BenchOptions(
    EndpointOptions("http://127.0.0.1:1", extra_body={"depth": "full"}, api_key="secret"), MIX,
    (Load(rate=1.0),), amount=Amount(1, 4), seed=7,
)  # fmt: skip


def benchmark(*levels: Level) -> Benchmark:
    found = Benchmark(OPTIONS.settings("m"))
    for one in levels:
        found = found.with_level(one)
    return found


@pytest.mark.parametrize(
    ("levels", "goodput", "is_saturated"),
    [
        ([level(1, 10), level(2, 9, 1), level(4, 8, 2), level(3, 10, 2)], 2, True),
        ([level(1, 10), level(2, 10)], 2, False),
        ([level(1, 0, 10)], 0, True),
        ([level(4, 0, 10), level(2, 0, 10), level(1, 10)], 1, True),
        ([], None, False),
        ([replace(level(1, 10), load=Load(concurrency=4))], None, False),
    ],
)
def test_goodput_is_the_highest_rate_that_holds(levels: list[Level], goodput: float | None, is_saturated: bool):
    found = benchmark(*levels)
    assert (found.goodput, found.is_saturated) == (goodput, is_saturated)


def test_the_file_has_every_request_and_no_key():
    found = benchmark(level(1, 3, 1), level(2, 2))
    text = found.to_json()
    assert TypeAdapter(Benchmark).validate_json(text) == found
    document = json.loads(text)
    assert [len(one["records"]) for one in document["levels"]] == [4, 2]
    assert document["levels"][0]["records"][0]["itl_s"] == [0.05] * 10
    assert document["goodput"] == 2 and document["settings"]["seed"] == 7
    assert document["settings"]["extra_body"] == {"depth": "full"} and "secret" not in text


@dataclass
class Station:
    """One request after the other, ``service_s`` each: it bears ``1 / service_s`` requests a second."""

    clock: VirtualClock
    service_s: float
    free_s: float = 0.0
    kinds: list[str] = field(default_factory=list)

    def body(self, request: PlannedRequest) -> bytes:
        return b""

    async def send(self, request: PlannedRequest, body: bytes, origin_s: float) -> Record:
        self.kinds.append(request.kind)
        sent_s = self.clock.now()
        self.free_s = max(self.free_s, sent_s) + self.service_s
        await self.clock.wait_until(self.free_s)
        took_s = self.clock.now() - sent_s
        return Record(
            request.index, request.kind, request.is_counted, request.prompt_tokens, request.max_tokens,
            request.arrival_s, sent_s - origin_s, ttft_s=took_s, e2e_s=took_s, output_tokens=1,
        )  # fmt: skip


async def measured(options: BenchOptions, service_s: float, cpu_share: float = 0.0) -> tuple[list[Level], set[str]]:
    clock, names = VirtualClock(cpu_share), set()
    levels: list[Level] = []
    station: Any = Station(clock, service_s)
    await clock.run(measure(station, options, clock, lambda name, *_: names.add(name), levels.append))
    return levels, names


async def test_a_sweep_finds_what_a_station_bears():
    options = replace(OPTIONS, loads=(), sweep_from=1.0, amount=Amount(10, 400))
    levels, _ = await measured(options, 0.1)
    found = benchmark(*levels)
    # A queue of one server, deterministic service: within 1 s, nine of ten wait no longer up to about 85 % of load.
    assert found.is_saturated and found.goodput is not None and 7 <= found.goodput < 10
    assert [one.load.value for one in levels[:5]] == [1, 2, 4, 8, 16]


async def test_a_sweep_goes_no_higher_than_the_generator_can():
    levels, _ = await measured(replace(OPTIONS, loads=(), sweep_from=1.0), 0.1, cpu_share=0.95)
    assert len(levels) == 1 and any("fell behind" in warning for warning in levels[0].warnings)


async def test_each_class_is_probed_at_its_longest_before_any_load():
    mix = parse_mix("4-9:1-3,2:1", Slo(1000, 100))
    workload = Workload(mix, prompts=PromptKind.IDS, token_ids=(0, 9), seed=0)
    async with scripted() as server, open_endpoint(EndpointOptions(server.url), HandClock()) as endpoint:
        await probe(endpoint, workload, HandClock())
        bodies = [request.body for request in server.requests if request.method == "POST"]
    assert [(len(body["prompt"]), body["max_tokens"]) for body in bodies] == [(9, 3), (2, 1)]


@pytest.mark.parametrize(
    ("record", "error", "says"),
    [
        (failed(Failure.HTTP_ERROR, status=400, detail="too long"), ConfigError, "HTTP 400.: too long; .*--mix"),
        (failed(Failure.HTTP_ERROR, status=500, detail="oops"), Unavailable, "HTTP 500.: oops; see that"),
        (failed(Failure.REJECTED, status=503, detail="no replica"), Unavailable, "no replica; see that"),
        (failed(Failure.BROKEN_STREAM, detail="cut"), Unavailable, r"failed \(broken_stream\): cut"),
    ],
)
async def test_what_can_not_be_answered_once_is_told_before_any_load(record: Record, error: type[Exception], says: str):
    class Refusing:
        num_sent = 0

        def body(self, request: PlannedRequest) -> bytes:
            return b""

        async def send(self, request: PlannedRequest, body: bytes, origin_s: float) -> Record:
            self.num_sent += 1
            return record

    refusing: Any = Refusing()
    with pytest.raises(error, match=says):
        await measure(refusing, OPTIONS, HandClock(), lambda *_: None, lambda _: None)
    assert refusing.num_sent == 1
