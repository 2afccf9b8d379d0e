"""Chooses a token of every row of logits: the likeliest, or one drawn.

A draw divides by the temperature, keeps the top k, of those the top p, and inverts the cumulative distribution, tokens
in the order of their ids, at one uniform number. That number depends on ``(seed, choice, index)`` alone: a re-run, a
resumed sequence or another batch draws the same token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shoal.wire.messages import SamplingParams

# Probabilities become integers of this scale: their cumulative sum is exact, hence the same and rising on every
# device, and still exact as float64, since it stays below 2**53.
_SCALE = 2.0**52


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One token to choose: from which row of the logits, for which choice, as which token of its output (from 0).

    Several rows may name one ``row_index``: the choices that fork after the boundary step. ``banned_token_ids``
    can't be chosen (those that would end the output before ``min_tokens``); their log-probabilities stay.
    """

    params: SamplingParams
    choice: int
    index: int
    row_index: int
    banned_token_ids: tuple[int, ...] = ()


class Chooser(Protocol):
    """Chooses of rows of ``logits`` ``[R, vocab]``, of any float dtype; they are left as they are."""

    def likeliest(self, logits: Tensor) -> tuple[Tensor, bool]:
        """``[R]``, of each row the first of the largest, or of the NaNs; and whether all of these are finite."""

    def drawn(self, logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        """``[R]`` token ids, drawn as the parameters of ``rows``, one for each, say. No logit is NaN."""


class TorchChooser:
    """By torch, on any device."""

    def likeliest(self, logits: Tensor) -> tuple[Tensor, bool]:
        if logits.device.type != "cpu":
            found = logits.argmax(dim=-1)
            return found, bool(logits.gather(1, found[:, None]).isfinite().all())
        # bfloat16 is the upper half of float32. torch does this, and what comes next, in a parallel region, for which a
        # row is too little: in a server, where its threads must be waited for, it takes ten times as long and more.
        if logits.dtype == torch.bfloat16:
            wide = logits.contiguous().view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
            wide <<= 16
            numbers = wide.view(np.float32)
        else:
            numbers = logits.numpy()
        at = numbers.argmax(axis=-1)
        return torch.from_numpy(at), bool(np.isfinite(numbers[np.arange(len(at)), at]).all())

    def drawn(self, logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        return _draw(logits, rows)


def uniform(seed: int, choice: int, index: int) -> float:
    """The number in [0, 1), a multiple of 2**-53, at which token ``index`` of ``choice`` is drawn.

    Philox4x64-10 with the key ``(seed, choice)`` and the counter ``(1, index, 0, 0)``, lowest word first (numpy
    steps the first word before it computes); the top 53 bits of the first word out. ``seed`` counts modulo 2**64.
    """
    words = (seed & 0xFFFF_FFFF_FFFF_FFFF, choice)
    generator = np.random.Philox(key=np.array(words, dtype=np.uint64), counter=np.array((0, index, 0, 0), np.uint64))
    return (int(generator.random_raw()) >> 11) / 2.0**53


def _draw(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """``[R]`` token ids, drawn from ``logits`` ``[R, vocab]`` as each row's parameters say."""
    scaled = logits.double()
    # The maximum becomes 0, so that a tiny temperature sends the others to -inf and overflows nothing.
    scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / _column([row.params.temperature for row in rows], scaled)
    _keep_top_k(scaled, [row.params.top_k for row in rows])
    _keep_top_p(scaled, [row.params.top_p for row in rows])
    cumulative = (scaled.softmax(dim=-1) * _SCALE).round().long().cumsum(dim=-1)
    uniforms = _column([uniform(row.params.seed, row.choice, row.index) for row in rows], scaled)
    # A uniform is at most 1 - 2**-53, so that even the rounded product is below the total.
    target = (uniforms * cumulative[:, -1:]).floor().long()
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def _keep_top_k(scaled: Tensor, limits: list[int]) -> None:
    """Set to -inf, in place, what is below a row's k-th largest; its equals stay (as in transformers)."""
    num_tokens = scaled.shape[-1]
    restricted = [i for i, k in enumerate(limits) if 0 < k < num_tokens]
    if not restricted:
        return
    at = torch.tensor(restricted, device=scaled.device)
    ranks = torch.tensor([[limits[i] - 1] for i in restricted], device=scaled.device)
    values = scaled[at]
    smallest = values.topk(max(limits[i] for i in restricted), dim=-1).values.gather(1, ranks)
    scaled[at] = values.masked_fill(values < smallest, -torch.inf)


def _keep_top_p(scaled: Tensor, limits: list[float]) -> None:
    """Set to -inf, in place, each token whose likelier ones have p already (of equals, lower ids are likelier).

    The likeliest always stays: nothing is before it.
    """
    restricted = [i for i, p in enumerate(limits) if p < 1]
    if not restricted:
        return
    at = torch.tensor(restricted, device=scaled.device)
    limit = _column([limits[i] for i in restricted], scaled)
    probabilities = scaled[at].softmax(dim=-1)
    # All tokens below (1 - p) / vocab hold less than 1 - p together, so p is reached without them: few are sorted.
    num_likely = max(1, int((probabilities >= (1 - limit) / scaled.shape[-1]).sum(dim=-1).amax()))
    likely = probabilities.topk(num_likely, dim=-1, sorted=False).indices.sort(dim=-1).values
    values, order = probabilities.gather(1, likely).sort(dim=-1, descending=True, stable=True)
    kept = values.cumsum(dim=-1) - values < limit
    kept[:, 0] = True
    removed = torch.ones_like(probabilities, dtype=torch.bool).scatter_(1, likely.gather(1, order), ~kept)
    scaled[at] = scaled[at].masked_fill(removed, -torch.inf)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)
