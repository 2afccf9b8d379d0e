"""What every arm is asked in a round: the same token ids, greedy, and answers of a fixed length."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.bench.workload import PlannedRequest


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
