"""Open and closed loops, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from scripted_endpoint import VirtualClock

from shoal.errors import ConfigError
from shoal_lab.bench.generator import Amount, Generator, Sent
from shoal_lab.bench.load import Load
from shoal_lab.bench.mix import Slo, parse_mix
from shoal_lab.bench.record import Failure, Record
from shoal_lab.bench.workload import PlannedRequest, PromptKind, Workload

WORKLOAD = Workload(parse_mix("4:2", Slo(1, 1)), prompts=PromptKind.IDS, token_ids=(0, 9), seed=3)


@dataclass
class FakeEndpoint:
    """Each request takes ``answer_s``. Making a body takes ``body_s``, in which nothing else can run."""

    clock: VirtualClock
    answer_s: float = 0.5
    body_s: float = 0.0
    failure_of: Callable[[int], Failure | None] = lambda index: None
    num_running: int = 0
    most_running: int = 0
    sent_s: list[float] = field(default_factory=list)

    def body(self, request: PlannedRequest) -> bytes:
        self.clock.now_s += self.body_s
        return str(request.index).encode()

    async def send(self, request: PlannedRequest, body: bytes, origin_s: float) -> Record:
        assert body == str(request.index).encode()
        sent_s = self.clock.now() - origin_s
        self.sent_s.append(sent_s)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        failure = self.failure_of(request.index)
        if failure is None:
            await self.clock.wait_until(self.clock.now() + self.answer_s)
        self.num_running -= 1
        return Record(
            request.index, request.kind, request.is_counted, request.prompt_tokens, request.max_tokens,
            request.arrival_s, sent_s, failure=failure,
        )  # fmt: skip


async def run(load: Load, amount: Amount, **options: object) -> tuple[Sent, FakeEndpoint, list[tuple[int, int]]]:
    clock = VirtualClock(cpu_share=0.25)
    clock.now_s = 100.0
    endpoint = FakeEndpoint(clock, **options)  # type: ignore[arg-type]
    progress: list[tuple[int, int]] = []
    generator = Generator(endpoint, WORKLOAD, amount, clock)
    sent = await clock.run(generator.run(load, lambda done, total: progress.append((done, total))))
    assert endpoint.num_running == 0
    return sent, endpoint, progress


async def test_an_open_loop_sends_when_requests_are_due_whatever_became_of_the_others():
    sent, endpoint, progress = await run(Load(rate=10.0), Amount(2, 30), answer_s=1e6)
    assert endpoint.most_running == 32
    arrivals = WORKLOAD.arrivals(10.0, 32)
    assert endpoint.sent_s == pytest.approx(arrivals)
    assert [record.arrival_s for record in sent.records] == arrivals
    assert [record.is_counted for record in sent.records] == [False] * 2 + [True] * 30
    assert sent.cpu_share == 0.25
    assert progress[-1] == (32, 32) and [done for done, _ in progress] == list(range(1, 33))


async def test_a_slow_generator_is_late_and_says_so():
    sent, _, _ = await run(Load(rate=10.0), Amount(0, 20), body_s=1.0)
    lateness = [record.lateness_s for record in sent.records]
    assert min(lateness[1:]) > 0.5 and lateness[-1] > 10
    on_time, _, _ = await run(Load(rate=10.0), Amount(0, 20), body_s=0.0)
    assert max(record.lateness_s for record in on_time.records) == pytest.approx(0)


async def test_a_closed_loop_has_so_many_requests_at_a_time():
    sent, endpoint, progress = await run(Load(concurrency=4), Amount(4, 12))
    assert endpoint.most_running == 4
    assert endpoint.sent_s == pytest.approx([0.0] * 4 + [0.5] * 4 + [1.0] * 4 + [1.5] * 4)
    assert [record.is_counted for record in sent.records] == [False] * 4 + [True] * 12
    assert {record.arrival_s for record in sent.records} == {None}
    assert sorted(record.index for record in sent.records) == list(range(16)) and progress[-1] == (16, 16)


async def test_a_closed_loop_warms_up_with_a_request_of_each_client_at_least():
    sent, endpoint, progress = await run(Load(concurrency=4), Amount(2, 6))
    assert [record.is_counted for record in sent.records] == [False] * 4 + [True] * 6 and progress[-1] == (10, 10)
    sent, endpoint, _ = await run(Load(concurrency=4), Amount(2, None, 1.0))
    assert [record.is_counted for record in sent.records] == [False] * 4 + [True] * 8
    assert endpoint.sent_s == pytest.approx([0.0] * 4 + [0.5] * 4 + [1.0] * 4)
    sent, _, _ = await run(Load(rate=4.0), Amount(2, 6))
    assert sum(record.is_counted for record in sent.records) == 6 and len(sent.records) == 8


@pytest.mark.parametrize("duration_s", [float("inf"), float("nan"), 0.0])
def test_a_duration_ends(duration_s: float):
    with pytest.raises(ConfigError, match="--duration-s must be more than 0, and finite"):
        Amount(8, duration_s=duration_s)


async def test_a_closed_loop_for_a_duration_counts_from_the_first_request_that_counts():
    sent, endpoint, progress = await run(Load(concurrency=2), Amount(2, None, 2.0))
    assert endpoint.sent_s == pytest.approx([0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.5, 1.5, 2.0, 2.0])
    assert sum(record.is_counted for record in sent.records) == 8
    assert progress[-1] == (2, 2) and progress[0] == (0, 2)


async def test_a_client_that_failed_pauses_before_its_next_request():
    sent, endpoint, _ = await run(Load(concurrency=1), Amount(1, 3), failure_of=lambda index: (
        Failure.REJECTED if index < 2 else None
    ))  # fmt: skip
    assert endpoint.sent_s == pytest.approx([0.0, 1.0, 2.0, 2.5])
    assert [record.failure for record in sent.records] == [Failure.REJECTED] * 2 + [None] * 2


async def test_a_run_that_is_stopped_leaves_no_request_behind():
    clock = VirtualClock()
    endpoint = FakeEndpoint(clock)
    generator = Generator(endpoint, WORKLOAD, Amount(0, 8), clock)
    task = asyncio.create_task(generator.run(Load(concurrency=4), lambda *_: None))
    while endpoint.num_running < 4:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == {asyncio.current_task()}
