"""The SDK against the gateway itself: both ends of the wire are ours, and have to agree."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from inference_server import TIMEOUT_S, Inference

from shoal.api.backend import Readiness
from shoal.client import AsyncClient, Depth, FinishReason, Message, Model
from shoal.errors import Overloaded

TEXT = "The pools hand the prompt over."


@pytest.fixture
async def client(inference: Inference) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(inference.address, timeout_s=TIMEOUT_S, max_attempts=2) as one:
        yield one


async def test_a_whole_answer_arrives_with_all_it_says(client: AsyncClient) -> None:
    completion = await client.generate("Hello", n=2, stop=" hand", logprobs=1, depth="full", request_id="order-66")
    assert [choice.text for choice in completion.choices] == ["The pools"] * 2
    choice = completion.choices[1]
    assert (choice.index, choice.finish_reason, choice.stop) == (1, FinishReason.STOP, " hand")
    assert [len(one.top) for one in choice.logprobs] == [1] * len(choice.token_ids)
    assert (completion.model, completion.request_id, completion.usage.depth) == ("smollm2", "order-66", Depth.FULL)


async def test_a_stream_adds_up_and_ends_with_its_usage(client: AsyncClient) -> None:
    stream = client.stream([Message("user", "Hi")])
    assert "".join([delta.text async for delta in stream]) == TEXT
    assert stream.usage is not None
    assert stream.usage.num_output_tokens > 1


async def test_leaving_the_loop_frees_the_pool(client: AsyncClient, inference: Inference) -> None:
    inference.backend.hold_after = 1
    async for _ in client.stream([1, 2, 3]):
        break
    assert await asyncio.to_thread(inference.backend.ended.acquire, timeout=TIMEOUT_S)
    assert inference.backend.num_running == 0


async def test_an_overload_is_tried_again_and_then_told(client: AsyncClient, inference: Inference) -> None:
    inference.backend.fail_after, inference.backend.error = 0, Overloaded("full", retry_after_s=0.01)
    with pytest.raises(Overloaded, match="full") as refused:
        await client.generate("Hello")
    assert refused.value.retry_after_s == 0.01
    assert len(inference.backend.requests) == 2


async def test_models_and_readiness_are_told(client: AsyncClient, inference: Inference) -> None:
    assert await client.models() == (Model("smollm2", max_context_tokens=400, created_s=1_750_000_000),)
    assert await client.is_ready()
    inference.backend.readiness_now = Readiness(num_decode=0, num_prefill=1)
    assert not await client.is_ready()
