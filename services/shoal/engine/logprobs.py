"""Log-probabilities of tokens: what is read off rows of logits, and leaves the device as a few numbers a token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

NOT_FINITE = "logits are NaN or infinite: check the weights, and the dtype they are run in"


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token's log-probability (natural, of the unmodified distribution), and the likeliest ``(token_id, logprob)`` in
    its place, best first, equal ones by id. NaN where the logits are no numbers."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    @property
    def is_broken(self) -> bool:
        return math.isnan(self.logprob)


def score(logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[ScoredToken]:
    """One token for each row of ``logits`` ``[R, vocab]``, with ``num_top[i]`` alternatives.

    Computed in float32, or in float64 where the logits are. ``logits`` are left as they are.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logprobs = logits.log_softmax(dim=-1, dtype=dtype)
    own: list[float] = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None]).squeeze(1).tolist()
    tops = _top(logprobs, min(max(num_top), logits.shape[-1]))
    scored = zip(token_ids, own, tops, num_top, strict=True)
    return [ScoredToken(token_id, logprob, top[:limit]) for token_id, logprob, top, limit in scored]


def _top(logprobs: Tensor, num_top: int) -> list[tuple[tuple[int, float], ...]]:
    """The best ``num_top`` of each row."""
    num_rows = logprobs.shape[0]
    if not num_top:
        return [()] * num_rows
    # topk leaves open which of several equals it takes: look at all that are as good as its last.
    least = logprobs.topk(num_top, dim=-1).values[:, -1:]
    found = (logprobs >= least).nonzero(as_tuple=True)
    values = logprobs[found].cpu().numpy()
    rows, token_ids = (index.cpu().numpy() for index in found)
    order = np.lexsort((token_ids, -values, rows))
    starts = np.searchsorted(rows, np.arange(num_rows + 1))
    pairs = list(zip(token_ids[order].tolist(), values[order].tolist(), strict=True))
    return [tuple(pairs[start : min(start + num_top, end)]) for start, end in pairwise(starts.tolist())]
