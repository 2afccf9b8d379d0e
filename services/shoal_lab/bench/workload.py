"""The requests of a benchmark and when they arrive: drawn from a seed, so that every endpoint gets the same ones.

Every load has the same classes and lengths in the same order, and the same gaps between arrivals but for their scale:
what differs between loads is the load. What is in the prompts differs, too, since a cache of prefixes would answer one
that it has seen faster the second time.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources

import numpy as np

from shoal_lab.bench.load import Load
from shoal_lab.bench.mix import RequestClass

_CHARS_PER_TOKEN = 4  # of English, about; what the endpoint counted is in the report
_ARRIVALS, _LENGTHS, _PROMPTS, _PROBE = range(4)


class PromptKind(enum.StrEnum):
    """How prompts are sent: random token ids, or English to /v1/completions, or as a message of a chat."""

    IDS = "ids"
    TEXT = "text"
    CHAT = "chat"


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """``prompt_tokens`` is how long the prompt should be; text has about that many. ``kind`` is its class's name.

    ``arrival_s`` is when it is due, after the load's start; ``None`` in a closed loop. What warms up isn't counted.
    """

    index: int
    kind: str
    prompt: tuple[int, ...] | str
    prompt_tokens: int
    max_tokens: int
    arrival_s: float | None = None
    is_counted: bool = True


class Workload:
    """``token_ids`` are the lowest and highest id that prompts are made of; ids must be below the vocabulary's size."""

    def __init__(
        self, mix: Sequence[RequestClass], *, prompts: PromptKind, token_ids: tuple[int, int], seed: int
    ) -> None:
        self.mix = tuple(mix)
        self._prompts, self._token_ids, self._seed = prompts, token_ids, seed
        shares = np.array([one.share for one in mix])
        self._shares = shares / shares.sum()

    def arrivals(self, rate: float, number: int) -> list[float]:
        """Seconds after the start, ascending, of a Poisson process: gaps are exponential, with mean ``1 / rate``."""
        gaps = self._rng(_ARRIVALS).exponential(1.0, number)
        return [float(moment) for moment in gaps.cumsum() / rate]

    def request(
        self, load: Load, index: int, *, arrival_s: float | None = None, is_counted: bool = True
    ) -> PlannedRequest:
        rng = self._rng(_LENGTHS, index)
        kind = self.mix[int(rng.choice(len(self.mix), p=self._shares))]
        num_prompt, num_output = (
            int(rng.integers(*bounds, endpoint=True)) for bounds in (kind.prompt_tokens, kind.output_tokens)
        )
        prompt = self._prompt(self._rng(_PROMPTS, *load.key, index), num_prompt)
        return PlannedRequest(index, kind.name, prompt, num_prompt, num_output, arrival_s, is_counted)

    def probe(self, index: int) -> PlannedRequest:
        """The longest request of the class at ``index``: what refuses it would refuse the class."""
        kind = self.mix[index]
        num_prompt, num_output = kind.prompt_tokens[1], kind.output_tokens[1]
        prompt = self._prompt(self._rng(_PROBE, index), num_prompt)
        return PlannedRequest(index, kind.name, prompt, num_prompt, num_output, is_counted=False)

    def _prompt(self, rng: np.random.Generator, num_tokens: int) -> tuple[int, ...] | str:
        if self._prompts is PromptKind.IDS:
            return tuple(rng.integers(*self._token_ids, num_tokens, endpoint=True).tolist())
        start, size = int(rng.integers(len(self._text))), _CHARS_PER_TOKEN * num_tokens
        times = -(-size // len(self._text)) + 1
        return (self._text * times)[start : start + size]

    @cached_property
    def _text(self) -> str:
        path = resources.files("shoal_lab") / "data" / "texts" / "prose" / "evaluation.txt"
        return path.read_text(encoding="utf-8")

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *key])
