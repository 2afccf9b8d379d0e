"""What is asked while things go wrong: requests that are drawn from a seed, each with one right answer."""

from __future__ import annotations

import random
from dataclasses import dataclass

from shoal.client import GenerateOptions
from shoal.wire.messages import Depth, GenerateRequest, RequestContext, SamplingParams

_SHORT_TOKENS, _LONG_TOKENS = range(24, 65), range(200, 257)
_OUTPUT_TOKENS = range(8, 25)
_FULL_DEPTH_EVERY = 8
# Of two candidates one can say how close the draw was: all that a random number decides is which side of one border
# it lies on.
_TOP_K = 2


@dataclass(frozen=True, slots=True)
class Case:
    """One request. Without ``seed`` it's greedy; else it draws from the two likeliest tokens, at temperature 1."""

    name: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    depth: Depth
    seed: int | None
    is_streamed: bool

    @property
    def options(self) -> GenerateOptions:
        """As a client asks."""
        return {
            "max_tokens": self.max_tokens,
            "temperature": 0.0 if self.seed is None else 1.0,
            "top_k": 0 if self.seed is None else _TOP_K,
            "seed": self.seed or 0,
            "ignore_eos": True,
            "depth": self.depth,
        }

    def request(self, model: str, timeout_s: float) -> GenerateRequest:
        """As the stages are asked, with the log-probabilities of three candidates."""
        sampling = SamplingParams(
            max_tokens=self.max_tokens,
            temperature=0.0 if self.seed is None else 1.0,
            top_k=0 if self.seed is None else _TOP_K,
            seed=self.seed or 0,
            num_logprobs=_TOP_K + 1,
            ignore_eos=True,
        )
        return GenerateRequest(
            RequestContext(self.name, timeout_s=timeout_s), model, self.prompt_token_ids, self.depth, sampling
        )


def draw_cases(num_cases: int, vocab_size: int, seed: int, *, long: bool = False) -> tuple[Case, ...]:
    """Half of them are greedy, half are streamed, and an eighth is at full depth, which decode computes alone."""
    chance = random.Random(f"{seed} {long}")
    return tuple(_draw(index, chance, vocab_size, long=long) for index in range(num_cases))


def _draw(index: int, chance: random.Random, vocab_size: int, *, long: bool) -> Case:
    lengths = _LONG_TOKENS if long else _SHORT_TOKENS
    return Case(
        name=f"{'long' if long else 'short'}-{index}",
        # The lowest ids of a vocabulary are its special tokens.
        prompt_token_ids=tuple(
            chance.randrange(min(16, vocab_size // 2), vocab_size) for _ in range(chance.choice(lengths))
        ),
        max_tokens=chance.choice(_OUTPUT_TOKENS),
        depth=Depth.FULL if index % _FULL_DEPTH_EVERY == _FULL_DEPTH_EVERY - 1 else Depth.SHALLOW,
        seed=None if index % 2 else chance.getrandbits(31),
        is_streamed=index // 2 % 2 == 0,
    )
