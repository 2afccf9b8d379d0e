"""What every arm is asked in a round: the same token ids, greedy, and answers of a fixed length."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from arms import MODEL_NAME

from shoal_lab.bench.clock import RealClock
from shoal_lab.bench.endpoint import EndpointOptions, open_endpoint
from shoal_lab.bench.record import Record
from shoal_lab.bench.workload import PlannedRequest


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """A long prompt asked alone, ``samples`` times a round; and ``streams`` short ones at once, for each of these."""

    prompt_tokens: int = 1800
    output_tokens: int = 64
    samples: int = 3
    streams: tuple[int, ...] = (8, 32)
    stream_prompt_tokens: int = 128
    stream_output_tokens: int = 64


class Loads:
    """``ids`` are a text's; each prompt begins somewhere else in it, so that no cache of prefixes knows it."""

    def __init__(self, ids: Sequence[int], options: LoadOptions, seed: int) -> None:
        self.options = options
        self._ids, self._seed = tuple(ids), seed

    def alone(self, key: str, output_tokens: int | None = None) -> PlannedRequest:
        """The long prompt of ``key``, such as a round's number."""
        options = self.options
        return self._request(0, key, options.prompt_tokens, output_tokens or options.output_tokens)

    def together(self, key: str, num_streams: int, output_tokens: int | None = None) -> list[PlannedRequest]:
        options = self.options
        return [
            self._request(
                index, f"{key}, {num_streams} streams, {index}", options.stream_prompt_tokens,
                output_tokens or options.stream_output_tokens,
            )
            for index in range(num_streams)
        ]  # fmt: skip

    def _request(self, index: int, key: str, num_tokens: int, max_tokens: int) -> PlannedRequest:
        start = random.Random(f"{self._seed}, {key}").randrange(len(self._ids))
        times = 2 + num_tokens // len(self._ids)
        prompt = (self._ids * times)[start : start + num_tokens]
        return PlannedRequest(index, key, prompt, num_tokens, max_tokens)


async def send_at_once(url: str, requests: list[PlannedRequest]) -> list[Record]:
    """Send all together and wait for all. Ends the program if one fails: its time would mean nothing."""
    async with open_endpoint(EndpointOptions(url, model=MODEL_NAME, timeout_s=300), RealClock()) as endpoint:
        records = await asyncio.gather(*(endpoint.send(one, endpoint.body(one), 0.0) for one in requests))
    for record in records:
        if record.failure is not None:
            sys.exit(f"error: a request failed ({record.failure}): {record.detail}")
    return list(records)


def span_s(records: Sequence[Record]) -> float:
    """From the first request to the last answer's end."""
    ended_s = max(record.sent_s + (record.e2e_s or 0.0) for record in records)
    return ended_s - min(record.sent_s for record in records)
