"""Streams as a client reads them, by either door, compared with the references."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
from clusters import MOMENT_S, Look, TestCluster, rise
from real_prompts import RealPrompt, assert_same_tokens

from shoal.client import AsyncClient, Depth


@dataclass
class Answer:
    """What a client has seen of a stream."""

    prompt: RealPrompt
    num_tokens: int
    status: int | None = None
    chunks: list[dict[str, Any]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    is_done: bool = False

    @property
    def error(self) -> dict[str, Any] | None:
        return self.chunks[-1].get("error") if self.chunks else None

    def assert_right(self) -> None:
        """Every token is the reference's."""
        assert self.status == 200 and self.is_done, (self.status, self.chunks[-1:])
        reference = self.prompt.shallow
        cut = replace(reference, token_ids=reference.token_ids[: self.num_tokens])
        assert_same_tokens({self.prompt.name: self.token_ids}, {self.prompt.name: cut})


@asynccontextmanager
async def connected(live: TestCluster) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=live.url, timeout=280, limits=limits) as client:
        yield client


def body_of(answer: Answer) -> dict[str, Any]:
    return {
        "model": "smollm2", "prompt": list(answer.prompt.token_ids), "max_tokens": answer.num_tokens,
        "temperature": 0, "ignore_eos": True, "depth": "shallow",
    }  # fmt: skip


async def ask(client: httpx.AsyncClient, answer: Answer, num_chunks: int | None = None) -> Answer:
    """Read a stream to its end, or hang up after ``num_chunks``."""
    body = body_of(answer) | {"stream": True}
    async with client.stream("POST", "/v1/completions", json=body, headers={"x-shoal-timing": "1"}) as response:
        answer.status = response.status_code
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                [choice] = answer.chunks[-1]["shoal"]["choices"]
                answer.token_ids, answer.is_done = choice["token_ids"], True
            elif line.startswith("data: "):
                answer.chunks.append(json.loads(line.removeprefix("data: ")))
                if len(answer.chunks) == num_chunks:
                    break
    return answer


async def ask_whole(client: httpx.AsyncClient, answer: Answer) -> Answer:
    """The same answer in one piece."""
    response = await client.post("/v1/completions", json=body_of(answer), headers={"x-shoal-timing": "1"})
    answer.status = response.status_code
    [choice] = response.json()["shoal"]["choices"]
    answer.token_ids, answer.is_done = choice["token_ids"], True
    return answer


async def ask_grpc(client: AsyncClient, answer: Answer, num_chunks: int | None = None) -> Answer:
    """The same stream over gRPC."""
    options = {"max_tokens": answer.num_tokens, "temperature": 0, "ignore_eos": True, "depth": Depth.SHALLOW}
    num_read = 0
    async for delta in client.stream(list(answer.prompt.token_ids), **options):  # type: ignore[arg-type]
        answer.token_ids += delta.token_ids
        num_read += 1
        if num_read == num_chunks:
            return answer
    answer.status, answer.is_done = 200, True
    return answer


async def until(live: TestCluster, asked: asyncio.Task[Answer], holds: Callable[[Look], bool]) -> Look:
    """The first look for which ``holds``; the answer must not be there before."""
    while not holds(look := await asyncio.to_thread(live.look)):
        assert not asked.done(), "it was answered before anything could happen to it"
        await asyncio.sleep(MOMENT_S)
    return look


def holders(look: Look, name: str, **labels: str) -> list[str]:
    """The replicas at which a metric isn't zero."""
    return [replica for replica, value in look.each(name, **labels).items() if value]


def has_first_chunk(before: Look) -> Callable[[Look], bool]:
    """A chunk has come over, and the lease isn't sealed."""
    return lambda look: (
        rise(before, look, "shoal_kv_transfer_bytes_total") > 0
        and look.metric("shoal_kv_leases", state="streaming") > 0
    )
