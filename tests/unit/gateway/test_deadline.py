"""Decode that doesn't keep the deadline: the gateway does, and lets go of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from shoal.errors import DeadlineExceeded, Unavailable
from shoal.gateway import deployment
from shoal.gateway.deadline import until_deadline
from shoal.gateway.deployment import PoolBackend
from shoal.messages import Depth, GenerateRequest, RequestContext, SamplingParams, TokenOutput

OUTPUT = TokenOutput(0, (1,), "a")


class Outputs:
    """What Serve's handle gives: ``num_outputs``, then the end or, if it ``hangs``, nothing at all."""

    def __init__(self, num_outputs: int = 0, *, hangs: bool = False) -> None:
        self.num_left = num_outputs
        self.hangs = hangs
        self.is_cancelled = False

    def options(self, *, stream: bool) -> Any:
        assert stream
        return self

    @property
    def generate(self) -> Any:
        return self

    def remote(self, request: GenerateRequest) -> Outputs:
        return self

    def __aiter__(self) -> AsyncIterator[TokenOutput]:
        return self

    async def __anext__(self) -> TokenOutput:
        if not self.num_left:
            if self.hangs:
                await asyncio.Event().wait()
            raise StopAsyncIteration
        self.num_left -= 1
        return OUTPUT

    def cancel(self) -> None:
        self.is_cancelled = True


def request(timeout_s: float) -> GenerateRequest:
    return GenerateRequest(RequestContext("id", timeout_s), "tiny", (1,), Depth.FULL, SamplingParams(max_tokens=4))


class Living:
    """Who of the decode pool lives."""

    def __init__(self, *names: str) -> None:
        self._names = frozenset(names)

    async def ids(self) -> frozenset[str]:
        return self._names


def pool(outputs: Outputs, living: Living | None = None) -> PoolBackend:
    return PoolBackend("shoal", outputs, living or Living("a"))  # type: ignore[arg-type]


async def test_outputs_in_time_come_unchanged() -> None:
    assert [output async for output in until_deadline(Outputs(3), 60)] == [OUTPUT] * 3


@pytest.mark.parametrize("num_outputs", [0, 2])
async def test_a_stream_that_stalls_ends_at_the_deadline(num_outputs: int) -> None:
    outputs = until_deadline(Outputs(num_outputs, hangs=True), 0.02)
    assert [await anext(outputs) for _ in range(num_outputs)] == [OUTPUT] * num_outputs
    with pytest.raises(DeadlineExceeded):
        await anext(outputs)


async def test_the_deadline_is_one_for_all_outputs() -> None:
    async def slow() -> AsyncIterator[int]:
        for number in range(100):
            await asyncio.sleep(0.01)
            yield number

    with pytest.raises(DeadlineExceeded):
        [number async for number in until_deadline(slow(), 0.1)]


async def test_a_timeout_of_the_stream_itself_is_not_the_deadline() -> None:
    async def failing() -> AsyncIterator[int]:
        raise TimeoutError("of its own")
        yield 0

    with pytest.raises(TimeoutError, match="of its own"):
        await anext(until_deadline(failing(), 60))


async def test_decode_that_doesnt_answer_is_cancelled_a_moment_after_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deployment, "_GRACE_S", 0.02)
    outputs = Outputs(1, hangs=True)
    answer = pool(outputs).generate(request(timeout_s=0))
    assert await anext(answer) == OUTPUT
    assert not outputs.is_cancelled
    with pytest.raises(DeadlineExceeded):
        await anext(answer)
    assert outputs.is_cancelled


async def test_decode_is_cancelled_when_the_answer_is_closed() -> None:
    outputs = Outputs(2)
    answer = pool(outputs).generate(request(timeout_s=60))
    await anext(answer)
    await answer.aclose()
    assert outputs.is_cancelled


async def test_without_a_decode_replica_nobody_waits_for_one() -> None:
    with pytest.raises(Unavailable, match="no decode replica") as refused:
        await anext(pool(Outputs(1), Living()).generate(request(timeout_s=60)))
    assert refused.value.retry_after_s == 1
