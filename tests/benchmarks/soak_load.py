"""A mixed load: long and short prompts, streams and whole answers, several choices, clients that leave, both doors.

Each kind is a client of its own that asks one thing after the other, so that as many are under way as there are kinds.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from shoal.client import AsyncClient, ShoalError

_TIMEOUT_S = 120.0
Ask = Callable[[], Awaitable[None]]


@dataclass
class Tally:
    """By kind, how many were answered as they should be; and what went wrong with the others."""

    answered: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)


class MixedLoad:
    """``ids`` are a text's: each prompt begins somewhere in it. Belongs to one event loop."""

    def __init__(self, url: str, grpc_address: str, ids: Sequence[int], *, long_tokens: int, seed: int) -> None:
        self._url, self._grpc_address = url, grpc_address
        self._ids = tuple(ids)
        self._long_tokens = long_tokens
        self._chance = random.Random(seed)
        self.tally = Tally()
        self._kinds: dict[str, Ask] = {
            "stream": self._stream,
            "stream, client leaves": lambda: self._stream(num_chunks=2),
            "whole answer": self._whole,
            "three choices": lambda: self._whole(n=3, temperature=0.8),
            "long prompt": lambda: self._whole(num_tokens=self._long_tokens),
            "long prompt, client leaves": self._leave_early,
            "gRPC stream": self._grpc_stream,
            "gRPC stream, client leaves": lambda: self._grpc_stream(num_deltas=2),
            "gRPC whole answer": self._grpc_whole,
            "refused": self._refused,
        }

    async def run(self, seconds: float) -> None:
        """Ask for so long, and wait for what is under way then."""
        end_s = time.monotonic() + seconds
        await asyncio.gather(*(self._repeat(kind, ask, end_s) for kind, ask in self._kinds.items()))

    async def _repeat(self, kind: str, ask: Ask, end_s: float) -> None:
        while time.monotonic() < end_s:
            try:
                await ask()
            except (ShoalError, httpx.HTTPError, AssertionError) as error:
                _count(self.tally.failed, f"{kind}: {type(error).__name__} {error}"[:200])
            else:
                _count(self.tally.answered, kind)
            # None of them takes the cores for itself.
            await asyncio.sleep(self._chance.uniform(0.05, 0.4))

    def _prompt(self, num_tokens: int | None = None) -> list[int]:
        num_tokens = num_tokens or self._chance.randrange(8, 120)
        start = self._chance.randrange(len(self._ids) - num_tokens)
        return list(self._ids[start : start + num_tokens])

    def _body(self, num_tokens: int | None = None, **fields: Any) -> dict[str, Any]:
        prompt, max_tokens = self._prompt(num_tokens), self._chance.randrange(2, 16)
        return {"model": "smollm2", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, **fields}

    def _http(self) -> httpx.AsyncClient:
        """A new one each time, and so a new connection."""
        return httpx.AsyncClient(base_url=self._url, timeout=_TIMEOUT_S, verify=False)

    async def _stream(self, num_chunks: int | None = None) -> None:
        body, lines = self._body(stream=True), []
        async with self._http() as client, client.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                lines += [line] if line else []
                if len(lines) == num_chunks:
                    return
        _require(response.status_code == 200 and lines[-1] == "data: [DONE]", lines[-1:])

    async def _whole(self, num_tokens: int | None = None, **fields: Any) -> None:
        body = self._body(num_tokens, **fields)
        async with self._http() as client:
            response = await client.post("/v1/completions", json=body)
        _require(response.status_code == 200, response.text)
        _require(len(response.json()["choices"]) == body.get("n", 1), response.text)

    async def _leave_early(self) -> None:
        """At any moment: while it's prefilled, handed over or decoded; or never, if it's answered before."""
        try:
            async with asyncio.timeout(self._chance.uniform(0, 1.5)):
                await self._whole(self._long_tokens)
        except TimeoutError:
            pass

    async def _grpc_stream(self, num_deltas: int | None = None) -> None:
        async with AsyncClient(self._grpc_address) as client:
            num_read = 0
            async for _ in client.stream(self._prompt(), max_tokens=12, ignore_eos=True, timeout_s=_TIMEOUT_S):
                num_read += 1
                if num_read == num_deltas:
                    return

    async def _grpc_whole(self) -> None:
        async with AsyncClient(self._grpc_address) as client:
            answer = await client.generate(self._prompt(), max_tokens=4, n=2, ignore_eos=True, timeout_s=_TIMEOUT_S)
        _require(len(answer.choices) == 2, answer)

    async def _refused(self) -> None:
        async with self._http() as client:
            response = await client.post("/v1/completions", json=self._body(max_tokens=-1))
        _require(response.status_code == 400, response.text)


def _count(numbers: dict[str, int], what: str) -> None:
    numbers[what] = numbers.get(what, 0) + 1


def _require(holds: bool, told: object) -> None:
    if not holds:
        raise AssertionError(told)
