"""Whoever stops reading ends the call: the server can free everything at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest
from fake_inference import PATIENCE_S, FakeInference

from shoal.client import AsyncClient, AsyncStream, Cancelled, Client, Stream


@pytest.fixture
def service() -> FakeInference:
    return FakeInference(num_words=2, holds=True)


def by_break(stream: Stream) -> None:
    for _ in stream:
        break


def by_close(stream: Stream) -> None:
    next(stream)
    stream.close()
    stream.close()


def by_with(stream: Stream) -> None:
    with stream:
        next(stream)


@pytest.mark.parametrize("leave", [by_break, by_close, by_with])
def test_the_server_sees_it_though_the_stream_is_still_held(
    leave: Callable[[Stream], None], target: str, service: FakeInference
) -> None:
    with Client(target) as client:
        stream = client.stream("The sea is")
        leave(stream)
        assert service.left.wait(PATIENCE_S)
        with pytest.raises(Cancelled):
            list(stream)


CALLS = {"generate": ["The sea is"], "stream": ["The sea is"], "models": [], "is_ready": []}


@pytest.mark.parametrize(("name", "prompt"), CALLS.items())
async def test_a_closed_client_says_so(target: str, name: str, prompt: list[str]) -> None:
    client, other = Client(target), AsyncClient(target)
    for _ in range(2):
        client.close()
        await other.close()
    with pytest.raises(Cancelled, match="this client is closed"):
        getattr(client, name)(*prompt)
    with pytest.raises(Cancelled, match="this client is closed"):
        await getattr(other, name)(*prompt)


def test_a_forgotten_stream_ends(target: str, service: FakeInference) -> None:
    with Client(target) as client:
        stream = client.stream("The sea is")
        next(stream)
        assert not service.left.is_set()
        del stream
        assert service.left.wait(PATIENCE_S)


def test_closing_the_client_ends_its_streams(target: str, service: FakeInference) -> None:
    client = Client(target)
    stream = client.stream("The sea is")
    next(stream)
    client.close()
    client.close()
    assert service.left.wait(PATIENCE_S)
    with pytest.raises(Cancelled):
        list(stream)


def test_another_thread_may_close_what_this_one_reads(target: str, service: FakeInference) -> None:
    with Client(target) as client:
        stream = client.stream("The sea is")
        closer = threading.Thread(target=lambda: service.held.wait(PATIENCE_S) and stream.close())
        closer.start()
        with pytest.raises(Cancelled):
            list(stream)
        closer.join()
        assert service.left.wait(PATIENCE_S)


# --- asyncio --------------------------------------------------------------------------------------------


async def has_left(service: FakeInference) -> bool:
    return await asyncio.to_thread(service.left.wait, PATIENCE_S)


async def by_break_async(stream: AsyncStream) -> None:
    async for _ in stream:
        break


async def by_close_async(stream: AsyncStream) -> None:
    await anext(stream)
    await stream.close()
    await stream.close()


async def by_with_async(stream: AsyncStream) -> None:
    async with stream:
        await anext(stream)


@pytest.mark.parametrize("leave", [by_break_async, by_close_async, by_with_async])
async def test_the_server_sees_it_though_the_async_stream_is_still_held(
    leave: Callable[[AsyncStream], Awaitable[None]], target: str, service: FakeInference
) -> None:
    async with AsyncClient(target) as client:
        stream = client.stream("The sea is")
        await leave(stream)
        assert await has_left(service)
        with pytest.raises(Cancelled):
            await anext(stream)


async def test_a_forgotten_async_stream_ends(target: str, service: FakeInference) -> None:
    async with AsyncClient(target) as client:
        stream = client.stream("The sea is")
        await anext(stream)
        assert not service.left.is_set()
        del stream
        assert await has_left(service)


async def read(stream: AsyncStream) -> list[str]:
    return [delta.text async for delta in stream]


async def test_cancelling_a_task_ends_the_stream_it_reads(target: str, service: FakeInference) -> None:
    async with AsyncClient(target) as client:
        reading = asyncio.create_task(read(client.stream("The sea is")))
        await asyncio.to_thread(service.held.wait, PATIENCE_S)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert await has_left(service)


async def test_cancelling_a_task_ends_the_answer_it_waits_for(target: str, service: FakeInference) -> None:
    async with AsyncClient(target) as client:
        waiting = asyncio.create_task(client.generate("The sea is"))
        await asyncio.to_thread(service.held.wait, PATIENCE_S)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await has_left(service)


async def test_closing_the_client_is_cancelled_to_whom_reads(target: str, service: FakeInference) -> None:
    client = AsyncClient(target)
    reading = asyncio.create_task(read(client.stream("The sea is")))
    await asyncio.to_thread(service.held.wait, PATIENCE_S)
    await client.close()
    await client.close()
    with pytest.raises(Cancelled):
        await reading
    assert await has_left(service)


def test_a_stream_that_outlives_its_loop_ends_quietly(target: str, service: FakeInference) -> None:
    async def begin() -> AsyncStream:
        stream = AsyncClient(target).stream("The sea is")
        await anext(stream)
        return stream

    stream = asyncio.run(begin())
    del stream  # whatever it raised would fail this test
    assert service.left.wait(PATIENCE_S)
